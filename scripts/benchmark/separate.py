"""Import of s3fs from a folder of its own, with its own botocore.

s3fs needs another version of botocore than the boto3 that mpreader is tested with, so scripts/bench_environment.sh
installs the two beside the other packages.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

__all__ = ["SEPARATE", "import_s3fs"]

SEPARATE: Final = Path(sys.prefix) / "s3fs"


def import_s3fs() -> ModuleType:
    """Import s3fs from its folder; where there is none, from the environment.

    The process must not have imported boto3 before: two versions of botocore can't be imported by one process.
    """
    if SEPARATE.exists():
        sys.path.insert(0, str(SEPARATE))
    return import_module("s3fs")
