"""Former place of the fsspec file system, for programs that register it from here; see :mod:`mpreader.fsspec`."""

from __future__ import annotations

from mpreader.fsspec.filesystem import RangeFileSystem

__all__ = ["RangeFileSystem"]
