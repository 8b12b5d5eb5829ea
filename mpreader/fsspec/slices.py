"""Slice reader of the fsspec file system: reads slices of files as ``bytes``, with the shared pool of the process.

A slice differs from a range of the fetcher: it is cut off at the end of the file, so that the size of the file must be
known before anything is read. Only the version that had this size is read. It is used by
:mod:`mpreader.fsspec.filesystem` and its open files; downloading is left to the fetcher.

A path is ``bucket/key`` or an http(s) URL.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import MpreaderError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.sources import Sources
from mpreader.pool.pool import release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion, Source
from mpreader.sources.versions import PinnedSource, try_resolve_versions

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client

__all__ = ["SliceReader", "Slices", "is_url"]

Slices = Mapping[str, Mapping[int, slice]]  # by path, then by a number that the caller chooses for each slice


class SliceReader:
    """Reads slices of files. Thread-safe; works after a fork.

    Args:
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool. None: the defaults.
    """

    def __init__(self, s3client_config: S3ClientConfig, pool_config: PoolConfig | None) -> None:
        self._s3client_config = s3client_config
        self._pool_config = pool_config
        self._sources = Sources(s3client_config)

    def client(self) -> BaseS3Client:
        """Return the S3 client. It is made at the first call."""
        return self._sources.client()

    def current(self, path: str) -> PinnedSource:
        """Ask the server for the current version of a file, and return a source that reads only that version.

        Raises:
            IsADirectoryError: The path is that of a bucket.
            TransportError: The server could not be asked, or refused.
        """
        [(_, found)] = self._try_current([path])
        if isinstance(found, Exception):
            raise found
        return found

    def at_version(self, path: str, version: ObjectVersion) -> PinnedSource:
        """Make the source of one version of a file. Makes no request.

        Raises:
            IsADirectoryError: The path is that of a bucket.
        """
        return PinnedSource(self._source(path), version)

    def fetcher(self, files: Mapping[str, PinnedSource]) -> RangeFetcher:
        """Make a fetcher on the shared pool whose sources are these files, named by their paths.

        It makes no HEAD requests, and reads no other version of the files. The caller must close it.
        """
        return SharedPoolFetcher(self._s3client_config, self._pool_config, files)

    def read(self, files: Mapping[str, PinnedSource], wanted: Slices, max_gap_size: float) -> dict[int, bytes]:
        """Read slices of files, all at the same time.

        Args:
            files: The files, by path.
            wanted: Slices to read. Slices of other files are ignored.
            max_gap_size: Largest gap, in bytes, between two slices that are fetched as one.

        Returns:
            The bytes of each slice of these files, by the number of the slice.

        Raises:
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
        """
        ranges: dict[str, list[tuple[int, int | None]]] = {}
        buffers: dict[int, io.BytesIO] = {}
        for path, file in files.items():
            ranges[path] = []
            for number, limits in wanted[path].items():
                start, end, _ = limits.indices(file.version.size)
                # A slice whose end lies before its start is empty; a range must not be like that.
                ranges[path].append((start, max(start, end)))
                buffers[number] = _buffer(end - start)
        out = {path: [buffers[number].getbuffer() for number in wanted[path]] for path in files}
        with self.fetcher(files) as fetcher:
            try:
                fetcher.fetch_many(ranges, out=out, max_gap_size=max_gap_size)
            except BaseException:
                # Collected as a circle with its buffer, in a traceback, a view would crash Python 3.12.
                for view in itertools.chain.from_iterable(out.values()):
                    with contextlib.suppress(BufferError):
                        view.release()
                raise
        del out  # getvalue() copies the bytes of a BytesIO as long as there are views of its buffer
        return {number: buffer.getvalue() for number, buffer in buffers.items()}

    def read_current(self, wanted: Slices, max_gap_size: float) -> dict[int, bytes]:
        """Read slices of the current versions of files.

        Raises:
            IsADirectoryError: A path is that of a bucket.
            MpreaderError: As for :meth:`read`. If several versions can't be had, the error of the first path is raised.
        """
        files: dict[str, PinnedSource] = {}
        for path, found in self._try_current(wanted):
            if isinstance(found, Exception):
                raise found
            files[path] = found
        return self.read(files, wanted, max_gap_size)

    def try_read_current(self, wanted: Slices, max_gap_size: float) -> dict[int, bytes | Exception]:
        """Read as :meth:`read_current` does, but return an error in place of bytes that could not be read."""
        contents: dict[int, bytes | Exception] = {}
        files: dict[str, PinnedSource] = {}
        for path, found in self._try_current(wanted):
            if isinstance(found, Exception):
                contents.update(dict.fromkeys(wanted[path], found))
            else:
                files[path] = found
        try:
            contents.update(self.read(files, wanted, max_gap_size))
        except MpreaderError:
            # The error of one file has ended the read of all files. Reading each file again by itself shows which of
            # them fail, and saves the bytes of the others.
            for path, file in files.items():
                contents.update(self._try_read(path, file, wanted, max_gap_size))
        return contents

    def close(self) -> None:
        """Close the connections, and stop the workers when their last user is done with them. Idempotent.

        The reader can still be used: it then connects and starts workers again.
        """
        self._sources.close()
        # The fetchers have released the pool with keep_warm, so that its workers still run. Using and releasing it once
        # more without keep_warm stops them, now or when the last other user releases the pool.
        release_shared_pool(shared_pool(self._pool_config, self._s3client_config))

    def _source(self, path: str) -> Source:
        """Make the source of a file; raises IsADirectoryError for a bucket."""
        if is_url(path):
            return self._sources.source(path)
        if not path.partition("/")[2]:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return self._sources.source(f"s3://{path}")

    def _try_current(self, paths: Iterable[str]) -> Iterable[tuple[str, PinnedSource | Exception]]:
        """Ask for the versions of all files at the same time; yields each file or its error, in the order of paths."""
        sources = {path: self._try_source(path) for path in paths}
        made = [source for source in sources.values() if not isinstance(source, Exception)]
        # fsspec's methods have no timeout, and the reader is never closed for good: nothing ends this wait early.
        resolved = iter(try_resolve_versions(made, math.inf, lambda: False))
        for path, source in sources.items():
            yield path, source if isinstance(source, Exception) else next(resolved)

    def _try_source(self, path: str) -> Source | Exception:
        try:
            return self._source(path)
        except (MpreaderError, IsADirectoryError) as error:
            return error.with_traceback(None)  # the caller keeps the error, which would keep these frames alive

    def _try_read(
        self, path: str, file: PinnedSource, wanted: Slices, max_gap_size: float
    ) -> Mapping[int, bytes | Exception]:
        try:
            return self.read({path: file}, wanted, max_gap_size)
        except MpreaderError as error:
            # The caller keeps the error, whose traceback would keep the frames of the fetch, and so views of memory.
            return dict.fromkeys(wanted[path], error.with_traceback(None))


def is_url(path: str) -> bool:
    """Return True if a path is an http(s) URL."""
    return path.startswith(("http://", "https://"))


class _Buffer(io.BytesIO):
    """A buffer that can be collected together with views of it.

    After a failed read both are part of the traceback. If they are collected as a circle, Python closes the buffer
    first, which a view forbids; from Python 3.13 on that would be reported on stderr.
    """

    def close(self) -> None:
        with contextlib.suppress(BufferError):
            super().close()


def _buffer(nbytes: int) -> io.BytesIO:
    """Make a buffer of ``nbytes`` to receive into, whose ``getvalue()`` returns the bytes without a copy."""
    buffer = _Buffer()
    if nbytes > 0:
        # Writing the last byte allocates the whole buffer at once.
        buffer.seek(nbytes - 1)
        buffer.write(b"\0")
    return buffer
