"""Command line ``mpreader``: arguments, printing, exit codes. The work itself is in ``tools/`` and ``dcp/``."""
