"""Slices of files: like ranges, but cut off at the file's end, given as ``bytes``, of versions that are known.

A path is ``bucket/key`` or an http(s) URL.
"""

from __future__ import annotations

import errno
import io
import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import MpreaderError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.pool.pool import release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion, Source
from mpreader.sources.uri import source_of
from mpreader.sources.versions import PinnedSource, try_resolve_versions

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client

__all__ = ["SliceReader", "Slices", "is_url"]

Slices = Mapping[str, Mapping[int, slice]]  # by path, and by a number for each


class SliceReader:
    """Reads slices on the process's shared pool. Thread-safe; works after a fork.

    Args:
        s3client_config: How S3 is reached.
        pool_config: Settings of the worker pool. None: the defaults.
    """

    def __init__(self, s3client_config: S3ClientConfig, pool_config: PoolConfig | None) -> None:
        self._s3client_config = s3client_config
        self._pool_config = pool_config
        self._client: BaseS3Client | None = None

    def client(self) -> BaseS3Client:
        """The S3 client, made when it is first needed."""
        if self._client is None:
            from mpreader.s3 import BaseS3Client

            self._client = BaseS3Client(s3client_config=self._s3client_config)
        return self._client

    def pin(self, path: str, version: ObjectVersion | None = None) -> PinnedSource:
        """The file at a path, of one version.

        Args:
            path: The path.
            version: The version. None: that of now, which the server is asked for.

        Raises:
            IsADirectoryError: It is a bucket.
            TransportError: The version could not be found out.
        """
        source = self._source(path)
        return PinnedSource(source, version or source.open())

    def fetcher(self, sources: Mapping[str, PinnedSource]) -> RangeFetcher:
        """A fetcher of the files at these paths: it makes no HEAD, and gives no byte of a later version."""
        return SharedPoolFetcher(self._s3client_config, self._pool_config, sources)

    def read(self, sources: Mapping[str, PinnedSource], wanted: Slices, max_gap: float) -> dict[int, bytes]:
        """Read slices of files, all at the same time.

        Args:
            sources: The files, by path.
            wanted: The slices of these, and perhaps of other files.
            max_gap: Largest gap, in bytes, between two slices that are read as one.

        Raises:
            MpreaderError: As for :meth:`mpreader.RangeFetcher.fetch`.
        """
        ranges: dict[str, list[tuple[int, int | None]]] = {}
        buffers: dict[int, io.BytesIO] = {}
        for path, source in sources.items():
            ranges[path] = []
            for number, limits in wanted[path].items():
                start, end, _ = limits.indices(source.version.size)
                ranges[path].append((start, max(start, end)))
                buffers[number] = _buffer(end - start)
        out = {path: [buffers[number].getbuffer() for number in wanted[path]] for path in sources}
        with self.fetcher(sources) as fetcher:
            fetcher.fetch_many(ranges, out=out, max_gap_size=max_gap)
        del out  # or what follows would be copies
        return {number: buffer.getvalue() for number, buffer in buffers.items()}

    def read_now(self, wanted: Slices, max_gap: float) -> dict[int, bytes]:
        """Read slices of the files that there are now.

        Raises:
            IsADirectoryError: A path is that of a bucket.
            MpreaderError: As for :meth:`read`; the first error.
        """
        sources: dict[str, PinnedSource] = {}
        for path, found in self._try_pin_all([*wanted]):
            if isinstance(found, Exception):
                raise found
            sources[path] = found
        return self.read(sources, wanted, max_gap)

    def try_read_now(self, wanted: Slices, max_gap: float) -> dict[int, bytes | Exception]:
        """The same, but an error takes the place of the bytes that could not be read."""
        contents: dict[int, bytes | Exception] = {}
        sources: dict[str, PinnedSource] = {}
        for path, found in self._try_pin_all([*wanted]):
            if isinstance(found, Exception):
                contents.update(dict.fromkeys(wanted[path], found))
            else:
                sources[path] = found
        try:
            contents.update(self.read(sources, wanted, max_gap))
        except MpreaderError:
            for path, source in sources.items():  # one after the other, or the same error would end them all again
                contents.update(self._try_read(path, source, wanted, max_gap))
        return contents

    def close(self) -> None:
        """Close connections, and end the workers once nobody uses them; a later use starts anew. Idempotent."""
        if self._client is not None:
            self._client.close()
        release_shared_pool(shared_pool(self._pool_config, self._s3client_config))

    def _source(self, path: str) -> Source:
        if not is_url(path) and not path.partition("/")[2]:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        uri = path if is_url(path) else f"s3://{path}"
        return source_of(uri, self.client, self._s3client_config.max_attempts)

    def _try_pin_all(self, paths: Iterable[str]) -> Iterable[tuple[str, PinnedSource | Exception]]:
        opened = {path: self._try_source(path) for path in paths}
        sources = {path: source for path, source in opened.items() if not isinstance(source, Exception)}
        found: dict[str, Any] = {
            **opened,
            **dict(zip(sources, try_resolve_versions([*sources.values()], math.inf, lambda: False), strict=True)),
        }
        return found.items()

    def _try_source(self, path: str) -> Source | Exception:
        try:
            return self._source(path)
        except (MpreaderError, IsADirectoryError) as error:
            return error.with_traceback(None)

    def _try_read(
        self, path: str, source: PinnedSource, wanted: Slices, max_gap: float
    ) -> Mapping[int, bytes | Exception]:
        try:
            return self.read({path: source}, wanted, max_gap)
        except MpreaderError as error:
            return dict.fromkeys(wanted[path], error.with_traceback(None))  # its frames would keep views


def is_url(path: str) -> bool:
    """Whether it is an http(s) URL."""
    return path.startswith(("http://", "https://"))


def _buffer(size: int) -> io.BytesIO:
    """Memory to be filled; its ``getvalue()`` is no copy."""
    buffer = io.BytesIO()
    if size > 0:
        buffer.seek(size - 1)
        buffer.write(b"\0")
    return buffer
