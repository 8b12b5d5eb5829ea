"""Downloads of the command ``fetch``: an object, or ranges of it, into a file or a pipe, resumed and verified."""
