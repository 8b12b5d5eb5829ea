"""Command line ``mpreader``: arguments, printing, exit codes.

Each module holds one subcommand, or what several of them share. The work itself is in ``tools/`` and ``dcp/``; nothing
of the library may import this package.
"""
