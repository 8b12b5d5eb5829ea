"""Range fetcher: the public, blocking interface to fetch ranges of S3 objects and http(s) URLs in parallel.

It checks arguments by making :class:`~mpreader.fetch.arguments.FetchOptions`, and leaves planning and downloading to
the engine. The same interface for asyncio is in :mod:`mpreader.fetch.aio`. It must work without torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.fetch.arguments import DEFAULT_FETCH_GAP_SIZE, DEFAULT_STREAM_ORDER, FetchOptions, Ranges, StreamOrder
from mpreader.fetch.engine import Engine
from mpreader.fetch.result import result_of
from mpreader.fetch.stream import RangeStream
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.stats import PoolStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.readers.client import S3Client
    from mpreader.sources.versions import PinnedSource

__all__ = ["RangeFetcher", "RangeStream", "SharedPoolFetcher", "fetch_ranges"]


class RangeFetcher:
    """Fetches byte ranges with a pool of worker processes of its own.

    Thread-safe. Workers start at the first fetch. They end with ``close()``, at the end of the ``with`` block, or when
    the program exits. ``mpreader.AsyncRangeFetcher`` offers the same methods for asyncio.

    It survives a fork and pickling, as DataLoader workers need: the copy has the same settings and a pool of its own,
    which starts at its first fetch. Credentials are looked up there, too. The copy of a closed fetcher is closed.

    The arguments of its methods mean the same in all of them:

    - ``source``: ``s3://bucket/key`` or an http(s) URL.
    - ``ranges``: ``(start, end)`` pairs or :class:`~mpreader.ItemRange`, in bytes, end exclusive, in any order; they
      may repeat, overlap and be empty. As in a slice of Python, an end of None is the end of the object, and negative
      numbers are counted from there: ``(-8, None)`` is the last 8 bytes. If ``ranges`` is None, the whole object is
      fetched as one range.
    - ``ranges_by_source``: ranges of several objects, which are fetched at the same time.
    - ``out``: the caller's own memory to receive into. It is one writable buffer (numpy array, CPU tensor, mmap,
      bytearray, …), which takes the ranges one after the other in the order of the input, or a list with a buffer for
      each range. Bytes are copied there piece by piece, so that ``max_memory`` does not limit their size. None: the
      method returns views of shared memory. For several sources, ``out`` is a mapping with an entry for each of them.
    - ``max_gap_size``: largest gap, in bytes, between two ranges that are fetched as one. Default: 1 MiB, which takes
      about as long to receive as the answer to another request takes to arrive. Large gaps take no memory.
    - ``timeout_s``: seconds for the whole call, until the last range has been taken; None: no limit.
    - ``order``: order in which a stream hands out its ranges. ``"offset"``: by their offsets, empty ranges first.
      ``"input"``: as they were given; then only neighbours in the input that ascend are fetched as one.
      ``"completion"``: as they arrive.

    A view is the caller's until its last reference dies. Ranges that were fetched as one share their memory, which is
    given back when all views of it are gone; views of overlapping ranges share their bytes.

    All methods that fetch raise, at the call or at the first range that is taken:

    - ``PlanError``: a range is malformed, or ends past the end of the object; or ``out`` has another size.
    - ``ConfigError``, ``TypeError``, ``ValueError``: another argument is wrong.
    - ``ObjectMissing``: there is no such object or bucket.
    - ``ObjectChanged``: the object was overwritten meanwhile. Where a server says nothing that tells versions apart,
      no ETag and no Last-Modified, that is noticed only if the size differs.
    - ``AccessDenied``: the service refused.
    - ``ArenaExhausted``: more bytes are asked for, or held, at one time than ``PoolConfig.max_memory`` allows.
    - ``PoolTimeout``: ``timeout_s`` has passed.
    - ``PoolClosed``: the fetcher was closed.
    - ``TransportError``, or another :class:`~mpreader.MpreaderError`: the bytes could not be fetched.

    Args:
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: Progress bars on stderr for calls that take long. False: never. None: on a terminal or in a notebook,
            and only in the first of several ranks. True: always.

    Raises:
        ConfigError: A setting is wrong, or the host has too little memory.
        TypeError: An argument is something else.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
        *,
        progress: bool | None = False,
    ) -> None:
        self._engine = Engine(s3client_config, pool_config, progress=progress)

    def fetch(
        self,
        source: str,
        ranges: Ranges,
        *,
        out: object = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> list[memoryview]:
        """Fetch ranges of one object; arguments and errors are described at the class.

        Returns:
            A view for each range, in the order of the input: of ``out``, or of shared memory.
        """
        outs = None if out is None else {source: out}
        return self.fetch_many({source: ranges}, out=outs, max_gap_size=max_gap_size, timeout_s=timeout_s)[source]

    def fetch_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        out: Mapping[str, object] | None = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> dict[str, list[memoryview]]:
        """Fetch ranges of several objects at once; arguments and errors are described at the class.

        Returns:
            By source, a view for each range, in the order of the input.
        """
        options = FetchOptions(max_gap_size=max_gap_size, timeout_s=timeout_s)
        plan = self._engine.plan_fetch(ranges_by_source, options, has_room=out is not None)
        result = result_of(plan, out)
        # The stream itself puts each piece into the result. The variable of a loop would keep the last piece, and so
        # its slot, while the next one is waited for.
        with RangeStream(self._engine, plan, options, result.put) as stream:
            for _ in stream:
                pass
        return result.views_by_uri()

    def stream(
        self,
        source: str,
        ranges: Ranges,
        *,
        order: StreamOrder = DEFAULT_STREAM_ORDER,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> RangeStream[tuple[int, memoryview]]:
        """Fetch ranges of one object one after the other; arguments and errors are described at the class.

        Returns:
            An iterator of ``(index, view)``: the position of the range in the input, and its bytes. Shared memory is
            used again when views are dropped; views that are kept stay valid. The stream is ended by its ``close()``,
            from any thread.
        """
        options = FetchOptions(order=order, max_gap_size=max_gap_size, timeout_s=timeout_s)
        plan = self._engine.plan_stream({source: ranges}, options)
        return RangeStream(self._engine, plan, options, lambda _, index, view: (index, view))

    def stream_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        order: StreamOrder = DEFAULT_STREAM_ORDER,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> RangeStream[tuple[str, int, memoryview]]:
        """Fetch ranges of several objects one after the other, without a pause between objects.

        Arguments and errors are described at the class. Ranges are handed out object by object, except with the order
        ``"completion"``.

        Returns:
            An iterator of ``(source, index, view)``; otherwise the same as that of :meth:`stream`.
        """
        options = FetchOptions(order=order, max_gap_size=max_gap_size, timeout_s=timeout_s)
        plan = self._engine.plan_stream(ranges_by_source, options)
        uris = plan.uris
        return RangeStream(
            self._engine, plan, options, lambda source_index, index, view: (uris[source_index], index, view)
        )

    def fetch_object(self, source: str, *, out: object = None, timeout_s: float | None = None) -> memoryview:
        """Fetch a whole object into one piece of memory; arguments and errors are described at the class."""
        return self.fetch(source, None, out=out, timeout_s=timeout_s)[0]

    def stat(self, source: str, *, timeout_s: float | None = None) -> ObjectVersion:
        """Ask the server for the version of an object: its size in bytes, its ETag, and the other validators.

        The ETag is "" if the server names none.

        Raises:
            TransportError: The server could not be asked, or refused.
            PoolTimeout: ``timeout_s`` has passed.
        """
        return self._engine.stat(source, FetchOptions(timeout_s=timeout_s))

    def stat_many(self, sources: Sequence[str], *, timeout_s: float | None = None) -> dict[str, ObjectVersion]:
        """Ask for the versions of several objects at once; by source. Otherwise the same as :meth:`stat`."""
        return self._engine.stat_many(sources, FetchOptions(timeout_s=timeout_s))

    def pinned(
        self, source: str, version: ObjectVersion
    ) -> contextlib.AbstractContextManager[tuple[str, PinnedSource]]:
        """Read only one version of an object in all calls within the context.

        Args:
            source: ``s3://bucket/key`` or an http(s) URL.
            version: The version, as :meth:`stat` returns it.

        Returns:
            A context manager, of a name that is given to the methods in place of ``source``, and the pinned source.
            The ``version`` of that has all that reads have found of the version.
        """
        return self._engine.sources.pinned(source, version)

    def start(self) -> None:
        """Start the workers, without waiting for them: the first fetch finds them up."""
        self._engine.pool.start()

    def client(self) -> S3Client:
        """Return the S3 client that the fetcher uses, so that a program needs no second one to list objects."""
        return self._engine.sources.client()

    @property
    def part_size(self) -> int:
        """Largest number of bytes of one request; a longer range is fetched by several requests."""
        return self._engine.pool.sizes.part_bytes

    @property
    def max_memory(self) -> int:
        """Largest number of bytes of shared memory that the views of this fetcher, and what is under way, can have."""
        return self._engine.pool.sizes.max_bytes

    @property
    def stats(self) -> PoolStats:
        """Statistics so far: bytes, requests, retries and seconds, in total and for each worker."""
        return self._engine.pool.stats()

    def close(self) -> None:
        """Stop the workers and wait until they have exited. Views that were handed out stay valid. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RangeFetcher({self._engine.pool!r})"


class SharedPoolFetcher(RangeFetcher):
    """A fetcher on the shared pool of the process, which keeps running for the next call.

    It must be closed exactly once, because the shared pool counts its users.

    Args:
        s3client_config: As for :class:`RangeFetcher`.
        pool_config: As for :class:`RangeFetcher`.
        known: Ready-made sources by name; see :class:`~mpreader.fetch.sources.Sources`.
        http_headers: Further headers for web servers; see there.
        for_host: The pool is that which receives for all ranks of the host.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None,
        pool_config: PoolConfig | None,
        known: Mapping[str, Source] | None = None,
        *,
        http_headers: Mapping[str, str] | None = None,
        for_host: bool = False,
    ) -> None:
        # In place of the __init__ of the base class, which would make an engine with a pool of its own.
        self._engine = Engine(
            s3client_config,
            pool_config,
            shares_pool="host" if for_host else True,
            known=known,
            http_headers=http_headers,
        )


def fetch_ranges(
    source: str,
    ranges: Ranges,
    *,
    out: object = None,
    max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
    timeout_s: float | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> list[memoryview]:
    """Fetch ranges of one object, with a pool that all calls with the same settings share.

    The pool ends its processes and frees its memory when it has been idle for ``PoolConfig.idle_timeout_s``. Arguments
    and errors are those of :class:`RangeFetcher`.

    Returns:
        A view for each range, in the order of the input: of ``out``, or of shared memory.
    """
    with SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return fetcher.fetch(source, ranges, out=out, max_gap_size=max_gap_size, timeout_s=timeout_s)
