"""Open file of the fsspec file system: gives fsspec's buffered file the bytes that its cache requests.

Position, buffering and caching are fsspec's; the bytes are read by :mod:`mpreader.fsspec.slices`. It is used by
:mod:`mpreader.fsspec.filesystem` only, and must not make requests itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fsspec.asyn import AbstractAsyncStreamedFile
from fsspec.spec import AbstractBufferedFile

from mpreader.fsspec.listing import Info
from mpreader.fsspec.slices import SliceReader
from mpreader.pool.source import ObjectVersion

__all__ = ["AsyncRangeFile", "RangeFile"]


class RangeFile(AbstractBufferedFile):  # type: ignore[misc]  # fsspec has no types
    """A file that was opened for reading. All of its bytes are of one version, also in a copy that is unpickled.

    Args:
        fs: Its file system, which opens it again when it is unpickled.
        path: Its path.
        reader: Reader of its bytes.
        version: Version to read.
        details: Description of the file, as ``fs.info`` returns it. None: fsspec asks for it when it is needed.
        options: Arguments of fsspec's ``AbstractBufferedFile``.
    """

    def __init__(
        self, fs: Any, path: str, reader: SliceReader, version: ObjectVersion, details: Info | None, **options: Any
    ) -> None:
        self._reader = reader
        self._file = reader.at_version(path, version)
        self._details = details  # fsspec reads this attribute, and makes a HEAD request if it is None
        super().__init__(fs, path, size=version.size, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        # The version, with what reads have found of it since, so that the copy reads this one, too.
        options = {"block_size": self.blocksize, "cache_type": self.cache.name or "none", "version": self._file.version}
        return _opened_again, (self.fs, self.path, options, self.loc)

    def _fetch_range(self, start: int, end: int) -> bytes:
        # fsspec's cache calls it for the bytes [start, end) that it does not hold. There is one slice, of number 0.
        return self._reader.read({self.path: self._file}, {self.path: {0: slice(start, end)}}, 0)[0]


class AsyncRangeFile(AbstractAsyncStreamedFile):  # type: ignore[misc]
    """A file that was opened by ``open_async``, whose ``read`` is awaited. All of its bytes are of one version.

    Args:
        file: The same file, whose bytes are read on a thread.
        run: Runs a function on a thread.
    """

    def __init__(self, file: RangeFile, run: Callable[..., Awaitable[Any]]) -> None:
        super().__init__(file.fs, file.path, size=file.size, cache_type="none")
        self._run = run
        self._opened = file

    async def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = await self._run(self._opened._fetch_range, start, min(end, self.size))
        return content


def _opened_again(fs: Any, path: str, options: dict[str, Any], position: int) -> RangeFile:
    """Open a file that is unpickled."""
    file: RangeFile = fs.open(path, **options)
    file.seek(position)
    return file
