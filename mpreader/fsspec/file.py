"""Open file of the fsspec file system: buffered by one of fsspec's caches, read on the process's shared pool.

Made by :mod:`mpreader.fsspec.filesystem` only.
"""

from __future__ import annotations

from typing import Any

from fsspec.spec import AbstractBufferedFile

from mpreader.fsspec.listing import Info
from mpreader.fsspec.slices import SliceReader
from mpreader.pool.source import ObjectVersion

__all__ = ["RangeFile"]


class RangeFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that was opened for reading. Every byte of it is of one version, in copies by pickle, too.

    Args:
        fs: Its file system, which opens it anew when it is unpickled.
        path: Its path.
        reader: Reader of its bytes.
        version: Version to read.
        details: Description of the file, as ``fs.info`` gives it; None where it was not asked for.
        options: Arguments of fsspec's ``AbstractBufferedFile``.
    """

    def __init__(
        self, fs: Any, path: str, reader: SliceReader, version: ObjectVersion, details: Info | None, **options: Any
    ) -> None:
        self._reader = reader
        self._file = reader.at_version(path, version)
        self._details = details  # or fsspec would make a HEAD for them
        # fsspec keeps arguments that it does not know, and opens a copy with them: the copy is of this version, too.
        super().__init__(fs, path, size=version.size, etag=version.etag, **options)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._reader.read({self.path: self._file}, {self.path: {0: slice(start, end)}}, 0)[0]
