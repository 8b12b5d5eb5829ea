"""Ranges of any S3 object or http(s) URL, fetched in parallel into shared memory; no torch involved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mpreader.config import MiB, PoolConfig, S3ClientConfig, check_type
from mpreader.fetch.engine import Engine, Ranges, deadline_of
from mpreader.fetch.plan import StreamOrder
from mpreader.fetch.stream import Collected, Filled, RangeStream
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.stats import PoolStats

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.readers.client import S3Client

__all__ = ["DEFAULT_FETCH_GAP_SIZE", "RangeFetcher", "RangeStream", "SharedPoolFetcher", "fetch_ranges"]

# A gap is worth fetching when that is cheaper than a request: 90 MB/s for some 10 ms.
DEFAULT_FETCH_GAP_SIZE: Final = 1 * MiB


class RangeFetcher:
    """Fetches byte ranges with a pool of worker processes of its own.

    Thread-safe. Workers start at the first fetch, and end with ``close()``, the context manager, or the program.
    ``mpreader.AsyncRangeFetcher`` is the same for asyncio.

    In all methods a *source* is ``s3://bucket/key`` or an http(s) URL, and *ranges* are ``(start, end)`` pairs or
    :class:`~mpreader.ItemRange`, in bytes, end exclusive, in any order; they may repeat, overlap and be empty. As in a
    slice, an end of None is the end of the object, and negative numbers are counted from there: ``(-8, None)`` is the
    last 8 bytes. None instead of ranges is the whole object.

    ``timeout_s`` bounds a whole call, in seconds; when it is up the call ends in ``PoolTimeout``.

    Args:
        s3client_config: How S3 is reached. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: Whether calls that take long show a progress bar on stderr. False: never. None: on a terminal or in
            a notebook, and only in the first of several ranks. True: always.

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
        check_type("s3client_config", s3client_config, S3ClientConfig)
        s3client_config = s3client_config or S3ClientConfig()
        self._engine = Engine(Pool(pool_config, s3client_config), s3client_config, progress=progress)

    def fetch(
        self,
        source: str,
        ranges: Ranges,
        *,
        out: object = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> list[memoryview]:
        """Fetch ranges of one object.

        Args:
            source: The object.
            ranges: The ranges; None: one, the whole object.
            out: Where to put the bytes: one writable buffer (numpy array, CPU tensor, mmap, bytearray, …) that takes
                the ranges one after the other, in the order of the input, or a list of one for each range. They are
                copied there piece by piece, so that ``max_memory`` does not bound their size. None: shared memory is
                handed out.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
            timeout_s: Seconds for the whole call. None: no limit.

        Returns:
            A view for each range, in the order of the input: of ``out``, or of shared memory. The latter is the
            caller's until its last reference dies; its memory is given back with that of its neighbours. Views of
            overlapping ranges share their bytes.

        Raises:
            PlanError: A range is malformed, or ends past the end of the object; or ``out`` has another size.
            ObjectMissing: There is no such object or bucket.
            AccessDenied: The service refused.
            ArenaExhausted: More bytes are asked for than ``PoolConfig.max_memory`` allows.
            PoolTimeout: The time was up.
            TransportError: The bytes could not be had.
            PoolClosed: The fetcher was closed.
        """
        many = {source: ranges}
        outs = None if out is None else {source: out}
        return self.fetch_many(many, out=outs, max_gap_size=max_gap_size, timeout_s=timeout_s)[source]

    def fetch_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        out: Mapping[str, object] | None = None,
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> dict[str, list[memoryview]]:
        """Fetch ranges of several objects at once; see :meth:`fetch`. ``out`` has an entry for each source."""
        deadline = deadline_of(timeout_s)
        order = self._engine.plan_fetch(ranges_by_source, max_gap_size, deadline, has_room=out is not None)
        result = Collected(order) if out is None else Filled(order, out)
        with RangeStream(self._engine, order, "completion", deadline, _as_it_is) as pieces:
            for piece in pieces:
                result.put(*piece)
        return dict(zip(order.uris, result.views, strict=True))

    def stream(
        self,
        source: str,
        ranges: Ranges,
        *,
        order: StreamOrder = "offset",
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> RangeStream[tuple[int, memoryview]]:
        """Fetch ranges of one object one after the other, in bounded memory.

        Args:
            source: The object.
            ranges: The ranges.
            order: In which order they come. ``"offset"``: that of their offsets, empty ranges first; ``"input"``: that
                of the input, where only neighbours that ascend are fetched as one; ``"completion"``: what has arrived
                first.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
            timeout_s: Seconds until the last range must have been taken. None: no limit.

        Returns:
            An iterator of ``(index, view)``: the position of the range in the input, and its bytes. Memory stays
            bounded as long as views are dropped; those that are kept stay valid. Its ``close()`` ends it, from any
            thread.

        Raises:
            ArenaExhausted: So many views are kept that ``PoolConfig.max_memory`` is used up.
            MpreaderError: As for :meth:`fetch`.
        """
        deadline = deadline_of(timeout_s)
        planned = self._engine.plan_stream({source: ranges}, max_gap_size, order, deadline)
        return RangeStream(self._engine, planned, order, deadline, lambda _, index, view: (index, view))

    def stream_many(
        self,
        ranges_by_source: Mapping[str, Ranges],
        *,
        order: StreamOrder = "offset",
        max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
        timeout_s: float | None = None,
    ) -> RangeStream[tuple[str, int, memoryview]]:
        """Fetch ranges of several objects one after the other, in bounded memory, without a pause between objects.

        Args:
            ranges_by_source: Ranges by source.
            order: As for :meth:`stream`; but for ``"completion"`` one object comes after the other.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
            timeout_s: Seconds until the last range must have been taken. None: no limit.

        Returns:
            An iterator of ``(source, index, view)``.

        Raises:
            MpreaderError: As for :meth:`stream`.
        """
        deadline = deadline_of(timeout_s)
        planned = self._engine.plan_stream(ranges_by_source, max_gap_size, order, deadline)
        uris = planned.uris
        return RangeStream(
            self._engine, planned, order, deadline, lambda number, index, view: (uris[number], index, view)
        )

    def fetch_object(self, source: str, *, out: object = None, timeout_s: float | None = None) -> memoryview:
        """Fetch a whole object into one piece of memory; see :meth:`fetch`."""
        return self.fetch(source, None, out=out, timeout_s=timeout_s)[0]

    def stat(self, source: str, *, timeout_s: float | None = None) -> ObjectVersion:
        """Ask for the size, in bytes, and the ETag ("" where there is none) of an object.

        Raises:
            TransportError: It could not be found out.
            PoolTimeout: The time was up.
        """
        return self._engine.stat(source, deadline_of(timeout_s))

    def client(self) -> S3Client:
        """The S3 client that it uses, for listing and the like."""
        return self._engine.client()

    @property
    def part_size(self) -> int:
        """Most bytes of one request; longer ranges are fetched by several."""
        return self._engine.pool.sizes.part_bytes

    @property
    def stats(self) -> PoolStats:
        """What the workers have done so far: bytes, requests, retries, seconds, and the numbers of each."""
        return self._engine.pool.stats()

    def close(self) -> None:
        """End the workers and wait until they are gone. Views that were handed out stay valid. Idempotent."""
        self._engine.pool.close()
        self._engine.close_client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RangeFetcher({self._engine.pool!r})"


class SharedPoolFetcher(RangeFetcher):
    """A fetcher on the process's shared pool, which stays warm for the next call.

    Args:
        s3client_config: As for :class:`RangeFetcher`.
        pool_config: As for :class:`RangeFetcher`.
        known: Sources to use for these URIs, of versions that are known already, say.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None,
        pool_config: PoolConfig | None,
        known: Mapping[str, Source] | None = None,
    ) -> None:
        check_type("s3client_config", s3client_config, S3ClientConfig)
        s3client_config = s3client_config or S3ClientConfig()
        self._engine = Engine(shared_pool(pool_config, s3client_config), s3client_config, known=known)

    def close(self) -> None:
        """Leave the pool, which stays warm."""
        release_shared_pool(self._engine.pool, keep_warm=True)


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

    The pool gives back its processes and memory when it has been idle for ``PoolConfig.idle_timeout_s``.

    Args:
        source: ``s3://bucket/key`` or an http(s) URL.
        ranges: ``(start, end)`` pairs or :class:`~mpreader.ItemRange`, in bytes, end exclusive; in any order, may
            repeat, overlap and be empty; ``(-8, None)`` is the last 8 bytes. None: the whole object.
        out: Where to put the bytes; see :meth:`RangeFetcher.fetch`. None: shared memory is handed out.
        max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
        timeout_s: Seconds for the whole call. None: no limit.
        s3client_config: How S3 is reached. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Returns:
        A view for each range, in the order of the input; see :meth:`RangeFetcher.fetch`, also for what is raised.
    """
    with SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return fetcher.fetch(source, ranges, out=out, max_gap_size=max_gap_size, timeout_s=timeout_s)


def _as_it_is(number: int, index: int, view: memoryview) -> tuple[int, int, memoryview]:
    return number, index, view
