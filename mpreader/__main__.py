"""``python -m mpreader``: the same command line as the installed command ``mpreader``."""

from __future__ import annotations

from mpreader.cli.main import main

if __name__ == "__main__":
    main()
