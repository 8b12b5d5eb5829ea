"""The coordinator: the one thread that decides what is received next, into which memory, by which worker."""
