"""s3fs wants another botocore than the tested boto3: scripts/bench installs the two beside the environment."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Final

__all__ = ["SEPARATE", "import_s3fs"]

SEPARATE: Final = Path(sys.prefix) / "s3fs"


def import_s3fs() -> ModuleType:
    """Import it from there, or from the environment where that has it; in a process that has no boto3 yet."""
    if SEPARATE.exists():
        sys.path.insert(0, str(SEPARATE))
    return import_module("s3fs")
