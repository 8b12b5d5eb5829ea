"""Fetcher of local files: has those methods of RangeFetcher that the readers of safetensors files call.

A file is read into memory rather than mapped: a mapping would change with the file, and a file that is truncated would
end the program by a SIGBUS. This module must work without torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from mpreader.config import MiB
from mpreader.errors import ConfigError, ObjectChanged, ObjectMissing, ShortRead, TransportError
from mpreader.pool.source import ObjectVersion
from mpreader.ranges import ItemRange

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LocalFetcher", "path_of"]

_PIECE_BYTES: Final = 8 * MiB
_THREADS: Final = 4  # more read no faster from the page cache, and these keep a disk of one queue busy
_AHEAD: Final = 2 * _THREADS  # pieces that are read before the caller takes them


def path_of(uri: str | os.PathLike[str]) -> str:
    """Return the path of a ``file://`` URI; any other URI, and a path, is returned as it is, as a string.

    Raises:
        ConfigError: It is neither a string nor a path.
    """
    path = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
    if not isinstance(path, str):
        raise ConfigError(f"a URI or a path is a string or a pathlib.Path, got {uri!r}")
    return path.removeprefix("file://")


class LocalFetcher:
    """Fetcher that reads byte ranges of local files with a few threads. A source is a path.

    Attributes:
        part_size: Bytes of the ranges that callers should cut larger ones into.
        max_memory: Bytes of memory that a stream may use at a time, as a caller is to assume. Only the pieces that are
            read ahead are bounded here: a view that is handed out has memory of its own.
    """

    part_size: Final = _PIECE_BYTES
    max_memory: Final = _PIECE_BYTES * _AHEAD * 4

    def __init__(self) -> None:
        self._opened: dict[str, int] = {}  # descriptors of the pinned files, by path
        self._start_threads()

    def list_files(self, directory: str) -> list[str]:
        """Return the paths of the files in a directory, sorted.

        Raises:
            ObjectMissing: There is no such directory.
        """
        with _errors_of(directory), os.scandir(directory) as entries:
            return sorted(entry.path for entry in entries if entry.is_file())

    def stat_many(self, paths: Sequence[str]) -> dict[str, ObjectVersion]:
        """Return the versions of files: their sizes, and the times of their last changes.

        Raises:
            ObjectMissing: There is no such file.
            TransportError: It can't be read.
        """
        versions = {}
        for path in paths:
            with _errors_of(path):
                versions[path] = _version(os.stat(path))
        return versions

    @contextlib.contextmanager
    def pinned(self, path: str, version: ObjectVersion) -> Iterator[tuple[str, object]]:
        """Read one version of a file only, in all calls within the context; yields the source's name and None.

        Raises:
            ObjectMissing: There is no such file.
            ObjectChanged: The file has another version on entry, or when the context is left without an error.
            TransportError: The file can't be opened.
        """
        with _errors_of(path):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._check_version(file, path, version)
            self._opened[path] = file
            yield path, None
            self._check_version(file, path, version)
        finally:
            self._opened.pop(path, None)
            os.close(file)

    def fetch_object(self, path: str) -> bytes:
        """Return all bytes of a file, which need not be pinned."""
        with _errors_of(path), open(path, "rb") as file:
            return file.read()

    def stream_many(
        self, ranges_by_source: Mapping[str, Sequence[tuple[int, int]]], **_: object
    ) -> Generator[tuple[str, int, memoryview], None, None]:
        """Yield source, index and bytes of each range of pinned files, in the order given; a few are read ahead.

        Neighbours are read together, up to ``part_size``, and share their memory, which nobody else uses: a view stays
        valid. Options of RangeFetcher's streams are ignored.

        Raises:
            ShortRead: A file is shorter than a range.
            TransportError: A file can't be read.
        """
        runs = [run for source, ranges in ranges_by_source.items() for run in _neighbours(source, ranges)]
        if os.getpid() != self._pid:  # a fork has left the threads behind
            self._start_threads()
        ahead = [self._threads.submit(self._read, run.path, run.extent) for run in runs[:_AHEAD]]
        try:
            for number, run in enumerate(runs):
                view = ahead.pop(0).result()
                later = runs[number + _AHEAD : number + _AHEAD + 1]
                ahead += [self._threads.submit(self._read, next_run.path, next_run.extent) for next_run in later]
                for index, start, end in run.members:
                    yield run.path, index, view[start - run.extent.start : end - run.extent.start]
                del view
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        self._threads, self._pid = ThreadPoolExecutor(_THREADS, "mpreader-local"), os.getpid()

    def _read(self, path: str, extent: ItemRange) -> memoryview:
        # A bytearray would be filled with zeros first.
        view = np.empty(extent.size, np.uint8).data
        done = 0
        while done < extent.size:
            with _errors_of(path):
                count = os.preadv(self._opened[path], [view[done:]], extent.start + done)
            if not count:
                raise ShortRead(
                    f"{path} ends at byte {extent.start + done}", key=path, range=(extent.start, extent.end), attempts=1
                )
            done += count
        return view

    def _check_version(self, file: int, path: str, version: ObjectVersion) -> None:
        if _version(os.fstat(file)) != version:
            raise ObjectChanged(f"{path} has changed while it was read", key=path, attempts=1)


class _Run(NamedTuple):
    """Ranges of a file that follow each other without a gap, with their indices; they are read together."""

    path: str
    extent: ItemRange
    members: list[tuple[int, int, int]]


def _neighbours(path: str, ranges: Sequence[tuple[int, int]]) -> Iterator[_Run]:
    """Yield the ranges of a file in runs of at most ``_PIECE_BYTES``; a larger range is a run of its own."""
    members: list[tuple[int, int, int]] = []
    for index, (start, end) in enumerate(ranges):
        if members and (start != members[-1][2] or end - members[0][1] > _PIECE_BYTES):
            yield _Run(path, ItemRange(members[0][1], members[-1][2]), members)
            members = []
        members.append((index, start, end))
    if members:
        yield _Run(path, ItemRange(members[0][1], members[-1][2]), members)


def _version(facts: os.stat_result) -> ObjectVersion:
    return ObjectVersion(facts.st_size, f'"{facts.st_dev}-{facts.st_ino}-{facts.st_mtime_ns}"')


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(f"{path}: there is no such file or directory", key=path) from error
    except OSError as error:
        raise TransportError(f"{path} can't be read: {error.strerror}", key=path) from error
