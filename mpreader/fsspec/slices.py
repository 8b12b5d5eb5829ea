"""Slice reader of the file system: ``bytes`` of slices of files, read on the process's shared pool.

A slice differs from a range of the fetcher: it is cut off at the file's end, so that the file's size must be known
before anything is read. What is read is of the version that had this size. Used by :mod:`mpreader.fsspec.filesystem`
only; downloads are the fetcher's.

A path is ``bucket/key`` or an http(s) URL.
"""

from __future__ import annotations

import errno
import io
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

Slices = Mapping[str, Mapping[int, slice]]  # by path, and by a number that the caller gives to each


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
        """Return the S3 client, which is made when it is first needed."""
        return self._sources.client()

    def current(self, path: str) -> PinnedSource:
        """Ask the server for a file; what is read of it then is of the version that there is now.

        Raises:
            IsADirectoryError: The path is that of a bucket.
            TransportError: The version could not be found out.
        """
        [(_, found)] = self._try_current([path])
        if isinstance(found, Exception):
            raise found
        return found

    def at_version(self, path: str, version: ObjectVersion) -> PinnedSource:
        """Make the source of one version of a file, without a request.

        Raises:
            IsADirectoryError: The path is that of a bucket.
        """
        return PinnedSource(self._source(path), version)

    def fetcher(self, files: Mapping[str, PinnedSource]) -> RangeFetcher:
        """Make a fetcher on the shared pool whose sources are these files, by path.

        It makes no HEAD, and gives no byte of a later version. The caller closes it.
        """
        return SharedPoolFetcher(self._s3client_config, self._pool_config, files)

    def read(self, files: Mapping[str, PinnedSource], wanted: Slices, max_gap_size: float) -> dict[int, bytes]:
        """Read slices of files, all at the same time.

        Args:
            files: The files, by path.
            wanted: Slices of these, and perhaps of other files.
            max_gap_size: Largest gap, in bytes, between two slices that are fetched as one.

        Returns:
            The bytes of each slice of these files, by its number.

        Raises:
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
        """
        ranges: dict[str, list[tuple[int, int | None]]] = {}
        buffers: dict[int, io.BytesIO] = {}
        for path, file in files.items():
            ranges[path] = []
            for number, limits in wanted[path].items():
                start, end, _ = limits.indices(file.version.size)
                ranges[path].append((start, max(start, end)))
                buffers[number] = _buffer(end - start)
        out = {path: [buffers[number].getbuffer() for number in wanted[path]] for path in files}
        with self.fetcher(files) as fetcher:
            fetcher.fetch_many(ranges, out=out, max_gap_size=max_gap_size)
        del out  # getvalue() would make copies as long as there are views of the buffers
        return {number: buffer.getvalue() for number, buffer in buffers.items()}

    def read_current(self, wanted: Slices, max_gap_size: float) -> dict[int, bytes]:
        """Read slices of the versions that there are now.

        Raises:
            IsADirectoryError: A path is that of a bucket.
            MpreaderError: As for :meth:`read`. Of several errors, the one of the first path is raised.
        """
        files: dict[str, PinnedSource] = {}
        for path, found in self._try_current(wanted):
            if isinstance(found, Exception):
                raise found
            files[path] = found
        return self.read(files, wanted, max_gap_size)

    def try_read_current(self, wanted: Slices, max_gap_size: float) -> dict[int, bytes | Exception]:
        """Read as :meth:`read_current` does, but put an error in place of the bytes that could not be read."""
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
            # Anew, one file after the other: an error of one file has ended the read of all.
            for path, file in files.items():
                contents.update(self._try_read(path, file, wanted, max_gap_size))
        return contents

    def close(self) -> None:
        """Close connections, and end the workers once nobody uses them; a later use starts anew. Idempotent."""
        self._sources.close()
        # Fetchers have left the pool warm. A use that ends without that lets its workers go, as soon as it is the last.
        release_shared_pool(shared_pool(self._pool_config, self._s3client_config))

    def _source(self, path: str) -> Source:
        if is_url(path):
            return self._sources.source(path)
        if not path.partition("/")[2]:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return self._sources.source(f"s3://{path}")

    def _try_current(self, paths: Iterable[str]) -> Iterable[tuple[str, PinnedSource | Exception]]:
        """Ask for the versions of files, all at the same time, and yield each, or the error, in the order of paths."""
        sources = {path: self._try_source(path) for path in paths}
        made = [source for source in sources.values() if not isinstance(source, Exception)]
        resolved = iter(try_resolve_versions(made, math.inf, lambda: False))
        for path, source in sources.items():
            yield path, source if isinstance(source, Exception) else next(resolved)

    def _try_source(self, path: str) -> Source | Exception:
        try:
            return self._source(path)
        except (MpreaderError, IsADirectoryError) as error:
            return error.with_traceback(None)

    def _try_read(
        self, path: str, file: PinnedSource, wanted: Slices, max_gap_size: float
    ) -> Mapping[int, bytes | Exception]:
        try:
            return self.read({path: file}, wanted, max_gap_size)
        except MpreaderError as error:
            # The caller keeps the error; with its frames it would keep their views, too.
            return dict.fromkeys(wanted[path], error.with_traceback(None))


def is_url(path: str) -> bool:
    """Return True if a path is an http(s) URL."""
    return path.startswith(("http://", "https://"))


def _buffer(nbytes: int) -> io.BytesIO:
    """Make memory to receive into; its ``getvalue()`` makes no copy."""
    buffer = io.BytesIO()
    if nbytes > 0:
        # To write the last byte allocates all, once.
        buffer.seek(nbytes - 1)
        buffer.write(b"\0")
    return buffer
