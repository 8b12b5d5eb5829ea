"""Range fetcher: ranges of any S3 object or http(s) URL, fetched in parallel into shared memory.

The public face of :mod:`mpreader.fetch`, without torch. Its asyncio twin is in :mod:`mpreader.fetch.aio`; both leave
planning and downloading to the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
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

__all__ = ["RangeFetcher", "RangeStream", "SharedPoolFetcher", "fetch_ranges"]


class RangeFetcher:
    """Fetches byte ranges with a pool of worker processes of its own.

    Thread-safe. Workers start at the first fetch, and end with ``close()``, the context manager, or the program.
    ``mpreader.AsyncRangeFetcher`` is the same for asyncio.

    The arguments of its methods mean the same in all of them:

    - ``source``: ``s3://bucket/key`` or an http(s) URL.
    - ``ranges``: ``(start, end)`` pairs or :class:`~mpreader.ItemRange`, in bytes, end exclusive, in any order; they
      may repeat, overlap and be empty. As in a slice, an end of None is the end of the object, and negative numbers
      are counted from there: ``(-8, None)`` is the last 8 bytes. None instead of ranges is one range, the whole object.
    - ``ranges_by_source``: ranges of several objects, which are fetched at the same time.
    - ``out``: the caller's own memory to receive into. One writable buffer (numpy array, CPU tensor, mmap, bytearray,
      …) takes the ranges one after the other, in the order of the input; a list has a buffer for each range. Bytes are
      copied there piece by piece, so that ``max_memory`` does not bound their size. None: views of shared memory are
      handed out. Where there are several sources, ``out`` has an entry for each.
    - ``max_gap_size``: largest gap, in bytes, between two ranges that are fetched as one. Default: 1 MiB, which a
      connection brings about as fast as another request would be answered.
    - ``timeout_s``: seconds for the whole call, until the last range has been taken; None: no limit.
    - ``order``: order in which a stream hands out its ranges. ``"offset"``: that of their offsets, empty ranges first.
      ``"input"``: that of the input; only neighbours that ascend are fetched as one. ``"completion"``: what has arrived
      first.

    A view that is handed out is the caller's until its last reference dies. The memory of a view of shared memory is
    given back together with that of the ranges beside it; views of overlapping ranges share their bytes.

    All methods that fetch raise, at the call or at the first range that is taken:

    - ``PlanError``: a range is malformed, or ends past the end of the object; or ``out`` has another size.
    - ``ConfigError``, ``TypeError``, ``ValueError``: another argument is wrong.
    - ``ObjectMissing``: there is no such object or bucket.
    - ``AccessDenied``: the service refused.
    - ``ArenaExhausted``: more bytes are asked for, or held, at one time than ``PoolConfig.max_memory`` allows.
    - ``PoolTimeout``: ``timeout_s`` has passed.
    - ``PoolClosed``: the fetcher was closed.
    - ``TransportError``, or another :class:`~mpreader.MpreaderError`: the bytes could not be had.

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
        with RangeStream(self._engine, plan, options, _as_it_is) as pieces:
            for piece in pieces:
                result.put(*piece)
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
            An iterator of ``(index, view)``: the position of the range in the input, and its bytes. Memory stays
            bounded as long as views are dropped; those that are kept stay valid. Its ``close()`` ends it, from any
            thread.
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

        Arguments and errors are described at the class. But for the order ``"completion"`` one object comes after the
        other.

        Returns:
            An iterator of ``(source, index, view)``; otherwise as that of :meth:`stream`.
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
        """Ask for the size, in bytes, and the ETag ("" where there is none) of an object.

        Raises:
            TransportError: It could not be found out.
            PoolTimeout: ``timeout_s`` has passed.
        """
        return self._engine.stat(source, FetchOptions(timeout_s=timeout_s))

    def client(self) -> S3Client:
        """Return the S3 client that the fetcher uses, for listing and the like."""
        return self._engine.sources.client()

    @property
    def part_size(self) -> int:
        """Most bytes of one request; longer ranges are fetched by several."""
        return self._engine.pool.sizes.part_bytes

    @property
    def stats(self) -> PoolStats:
        """Bytes, requests, retries and seconds of the workers so far, and each worker's share."""
        return self._engine.pool.stats()

    def close(self) -> None:
        """End the workers and wait until they are gone. Views that were handed out stay valid. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RangeFetcher({self._engine.pool!r})"


class SharedPoolFetcher(RangeFetcher):
    """A fetcher on the process's shared pool, which stays warm for the next call; to be closed exactly once.

    Args:
        s3client_config: As for :class:`RangeFetcher`.
        pool_config: As for :class:`RangeFetcher`.
        known: Sources to use for these names in place of URIs, such as ones whose version is known already.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None,
        pool_config: PoolConfig | None,
        known: Mapping[str, Source] | None = None,
    ) -> None:
        self._engine = Engine(s3client_config, pool_config, shares_pool=True, known=known)


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
    """Fetch ranges of one object, on a pool that all calls with the same settings share.

    The pool gives back its processes and memory when it has been idle for ``PoolConfig.idle_timeout_s``. Arguments and
    errors are those of :class:`RangeFetcher`.

    Returns:
        A view for each range, in the order of the input: of ``out``, or of shared memory.
    """
    with SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return fetcher.fetch(source, ranges, out=out, max_gap_size=max_gap_size, timeout_s=timeout_s)


def _as_it_is(source_index: int, index: int, view: memoryview) -> tuple[int, int, memoryview]:
    return source_index, index, view
