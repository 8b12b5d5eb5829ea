"""The command ``mpreader``: arguments, printing, exit codes. What the commands do is in the modules they call."""
