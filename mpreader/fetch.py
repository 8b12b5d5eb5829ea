"""Ranges of any S3 object or http(s) URL, fetched in parallel into shared memory; no torch involved."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from mpreader.config import MiB, PoolConfig, S3ClientConfig, check_type
from mpreader.errors import ArenaExhausted, ConfigError, PlanError
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion, Route, Source
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Fill, FillPart
from mpreader.ranges import ItemRange, RangeGroup, check_max_gap, coalesce, coverage, partition

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.s3 import S3Client

__all__ = ["DEFAULT_FETCH_GAP_SIZE", "RangeFetcher", "fetch_ranges"]

# A gap is worth fetching when that is cheaper than a request: 90 MB/s for some 10 ms.
DEFAULT_FETCH_GAP_SIZE: Final = 1 * MiB
_ALIGNMENT: Final = 64  # of each group in its slot, so that arrays of any type can be made on it

RangeLike = ItemRange | tuple[int, int]


class RangeFetcher:
    """Fetches byte ranges with a pool of worker processes of its own.

    Thread-safe. Workers start at the first fetch, and end with ``close()``, the context manager, or the program.

    Args:
        s3client_config: How S3 is reached. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Raises:
        ConfigError: A setting is wrong, or the host has too little memory.
        TypeError: An argument is something else.
    """

    def __init__(self, s3client_config: S3ClientConfig | None = None, pool_config: PoolConfig | None = None) -> None:
        check_type("s3client_config", s3client_config, S3ClientConfig)
        self._s3client_config = s3client_config or S3ClientConfig()
        self._pool = Pool(pool_config, self._s3client_config)
        self._client: S3Client | None = None

    def fetch(
        self, source: str, ranges: Iterable[RangeLike], *, max_gap_size: float = DEFAULT_FETCH_GAP_SIZE
    ) -> list[memoryview]:
        """Fetch ranges of one object.

        Args:
            source: ``s3://bucket/key`` or an http(s) URL.
            ranges: ``(start, end)`` pairs or :class:`~mpreader.ItemRange`, in bytes, end exclusive; in any order,
                may repeat, overlap and be empty.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.

        Returns:
            A view for each range, in the order of the input. A view is the caller's until its last reference dies;
            its memory is given back with that of its neighbours. Views of overlapping ranges share their bytes.

        Raises:
            PlanError: A range is malformed, or ends past the end of the object.
            ObjectMissing: There is no such object or bucket.
            AccessDenied: The service refused.
            ArenaExhausted: More bytes are asked for than ``PoolConfig.max_memory`` allows.
            TransportError: The bytes could not be had.
            PoolClosed: The fetcher was closed.
        """
        return self.fetch_many({source: ranges}, max_gap_size=max_gap_size)[source]

    def fetch_many(
        self, ranges_by_source: Mapping[str, Iterable[RangeLike]], *, max_gap_size: float = DEFAULT_FETCH_GAP_SIZE
    ) -> dict[str, list[memoryview]]:
        """Fetch ranges of several objects at once; see :meth:`fetch`."""
        orders = [(self._source(uri), _to_item_ranges(ranges)) for uri, ranges in ranges_by_source.items()]
        results = [[memoryview(b"")] * len(ranges) for _, ranges in orders]
        # Before they are cut into parts: a mistaken range of terabytes would be millions.
        wanted = sum(interval.size for _, item_ranges in orders for interval in coverage(item_ranges))
        self._check_room(wanted)
        batches = self._plan(orders, max_gap_size)
        self._check_room(sum(batch.fill.nbytes for batch in batches))
        for order, index, view in self._take(batches):
            results[order][index] = view
        return dict(zip(ranges_by_source, results, strict=True))

    def stream(
        self, source: str, ranges: Iterable[RangeLike], *, max_gap_size: float = DEFAULT_FETCH_GAP_SIZE
    ) -> Iterator[tuple[int, memoryview]]:
        """Fetch ranges of one object one after the other, in bounded memory.

        Args:
            source: ``s3://bucket/key`` or an http(s) URL.
            ranges: As for :meth:`fetch`.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.

        Yields:
            ``(index, view)``: the position of the range in the input, and its bytes. Empty ranges come first, the
            others in the order of their offsets in the object. Memory stays bounded as long as views are dropped;
            those that are kept stay valid.

        Raises:
            ArenaExhausted: So many views are kept that ``PoolConfig.max_memory`` is used up.
            MpreaderError: As for :meth:`fetch`.
        """
        pieces = self.stream_many({source: ranges}, max_gap_size=max_gap_size)
        return ((index, view) for _, index, view in pieces)

    def stream_many(
        self, ranges_by_source: Mapping[str, Iterable[RangeLike]], *, max_gap_size: float = DEFAULT_FETCH_GAP_SIZE
    ) -> Iterator[tuple[str, int, memoryview]]:
        """Fetch ranges of several objects one after the other, in bounded memory, without a pause between objects.

        Args:
            ranges_by_source: Ranges as for :meth:`fetch`, by source.
            max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.

        Yields:
            ``(source, index, view)``: empty ranges first, then one object after the other, each as :meth:`stream` does.

        Raises:
            MpreaderError: As for :meth:`stream`.
        """
        uris = list(ranges_by_source)
        orders = [(self._source(uri), _to_item_ranges(ranges)) for uri, ranges in ranges_by_source.items()]
        self._check_room(max((item_range.size for _, ranges in orders for item_range in ranges), default=0))
        return self._stream(uris, [ranges for _, ranges in orders], self._plan(orders, max_gap_size))

    def fetch_object(self, source: str) -> memoryview:
        """Fetch a whole object into one piece of memory; returns and raises as :meth:`fetch`."""
        opened = self._source(source)
        pinned = _PinnedSource(opened, opened.open())
        whole = [ItemRange(0, pinned.version.size)]
        for _, _, view in self._take(self._plan([(pinned, whole)], 0)):
            return view
        return memoryview(b"")

    @property
    def stats(self) -> PoolStats:
        """What the workers have done so far: bytes, requests, retries, seconds, and the numbers of each."""
        return self._pool.stats()

    def close(self) -> None:
        """End the workers and wait until they are gone. Views that were handed out stay valid. Idempotent."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"RangeFetcher({self._pool!r})"

    # -- steps

    def _check_room(self, wanted: int) -> None:
        if wanted > self._pool.sizes.max_bytes:
            raise ArenaExhausted(
                f"{wanted} bytes are asked for at one time, {self._pool.sizes.max_bytes} may be held: use stream() "
                "with smaller ranges, or raise PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            )

    def _source(self, uri: str) -> Source:
        if not isinstance(uri, str):
            raise ConfigError(f"a source is text such as s3://bucket/key or https://host/path, got {uri!r}")
        if uri.startswith("s3://"):
            self._pool.start()  # while boto3 is imported and a client made
            from mpreader.s3 import S3Client, S3Source, parse_s3_uri

            bucket, key = parse_s3_uri(uri)
            if not key:
                raise ConfigError(f"{uri!r} names a bucket, not an object in it; write s3://bucket/key")
            if self._client is None:
                self._client = S3Client(s3client_config=self._s3client_config)
            return S3Source(self._client, bucket, key)
        from mpreader.web import HttpSource

        return HttpSource(uri, max_attempts=self._s3client_config.max_attempts)

    def _plan(self, orders: Sequence[tuple[Source, list[ItemRange]]], max_gap_size: float) -> list[_Batch]:
        check_max_gap(max_gap_size)
        sizes = self._pool.sizes
        return [
            batch
            for number, (source, ranges) in enumerate(orders)
            for batch in _pack(number, source, coalesce(ranges, max_gap_size), sizes.part_bytes, sizes.block_bytes)
        ]

    def _take(self, batches: list[_Batch]) -> Iterator[tuple[int, int, memoryview]]:
        if not batches:
            return
        transfer = self._pool.read([batch.fill for batch in batches])
        try:
            for number, batch in enumerate(batches):
                slot_view = transfer.take(number)
                for index, slot_offset, size in batch.members:
                    yield batch.order, index, slot_view[slot_offset : slot_offset + size]
                del slot_view  # or it would keep the slot while the next one is waited for
        finally:
            transfer.close()

    def _stream(
        self, uris: list[str], orders: list[list[ItemRange]], batches: list[_Batch]
    ) -> Iterator[tuple[str, int, memoryview]]:
        for uri, ranges in zip(uris, orders, strict=True):
            for index, item_range in enumerate(ranges):
                if not item_range.size:
                    yield uri, index, memoryview(b"")
        for order, index, view in self._take(batches):
            yield uris[order], index, view
            del view


class _SharedPoolFetcher(RangeFetcher):
    """A fetcher on the process's shared pool, which stays warm for the next call."""

    def __init__(self, s3client_config: S3ClientConfig | None, pool_config: PoolConfig | None) -> None:
        check_type("s3client_config", s3client_config, S3ClientConfig)
        self._s3client_config = s3client_config or S3ClientConfig()
        self._pool = shared_pool(pool_config, self._s3client_config)
        self._client = None

    def close(self) -> None:
        release_shared_pool(self._pool, keep_warm=True)


def fetch_ranges(
    source: str,
    ranges: Iterable[RangeLike],
    *,
    max_gap_size: float = DEFAULT_FETCH_GAP_SIZE,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> list[memoryview]:
    """Fetch ranges of one object, on a pool that all calls with the same settings share.

    The pool gives back its processes and memory when it has been idle for ``PoolConfig.idle_timeout_s``.

    Args:
        source: ``s3://bucket/key`` or an http(s) URL.
        ranges: ``(start, end)`` pairs or :class:`~mpreader.ItemRange`, in bytes, end exclusive; in any order, may
            repeat, overlap and be empty.
        max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
        s3client_config: How S3 is reached. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Returns:
        A view for each range, in the order of the input; see :meth:`RangeFetcher.fetch`, also for what is raised.
    """
    with _SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return fetcher.fetch(source, ranges, max_gap_size=max_gap_size)


class _Batch(NamedTuple):
    """A fill, and where in its slot the ranges of order number ``order`` are: (index, slot offset, bytes)."""

    order: int
    fill: Fill
    members: tuple[tuple[int, int, int], ...]


class _PinnedSource:
    """A source whose version is known already: it needs no second HEAD."""

    def __init__(self, source: Source, version: ObjectVersion) -> None:
        self.version = version
        self.bucket = source.bucket
        self.key = source.key
        self.uri = source.uri
        self.max_attempts = source.max_attempts
        self._source = source

    def open(self) -> ObjectVersion:
        return self.version

    def route(self) -> Route:
        return self._source.route()


def _pack(
    order: int, source: Source, groups: Iterable[RangeGroup], part_bytes: int, slot_bytes: int
) -> Iterator[_Batch]:
    """Put groups into slots: as many together as fit into ``slot_bytes``, a larger range into a slot of its own."""
    parts: list[FillPart] = []
    members: list[tuple[int, int, int]] = []
    nbytes = 0
    for group in itertools.chain.from_iterable(_cut_between_ranges(group, slot_bytes) for group in groups):
        size = group.end - group.start
        slot_offset = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if parts and slot_offset + size > slot_bytes:
            yield _Batch(order, Fill(source, nbytes, tuple(parts)), tuple(members))
            parts, members, slot_offset = [], [], 0
        for part in partition(group, part_bytes):
            parts.append(FillPart(part.start, part.end, slot_offset + part.start - group.start))
        for index, item_range in zip(group.indices, group.item_ranges, strict=True):
            members.append((index, slot_offset + item_range.start - group.start, item_range.size))
        nbytes = slot_offset + size
    if parts:
        yield _Batch(order, Fill(source, nbytes, tuple(parts)), tuple(members))


def _cut_between_ranges(group: RangeGroup, most_bytes: int) -> Iterator[RangeGroup]:
    # Or a thousand small ranges side by side would need one slot for all of them, and be given back together.
    first, end = 0, group.start
    for position, item_range in enumerate(group.item_ranges):
        start = group.item_ranges[first].start
        if position > first and item_range.start >= end and item_range.end - start > most_bytes:
            yield RangeGroup(start, end, group.item_ranges[first:position], group.indices[first:position])
            first = position
        end = max(end, item_range.end)
    yield RangeGroup(group.item_ranges[first].start, end, group.item_ranges[first:], group.indices[first:])


def _to_item_ranges(ranges: Iterable[RangeLike]) -> list[ItemRange]:
    item_ranges = []
    for item_range in ranges:
        if isinstance(item_range, ItemRange):
            item_ranges.append(item_range)
            continue
        try:
            start, end = map(_to_int, item_range)
        except (TypeError, ValueError):
            raise PlanError(
                f"a range is a pair (start, end) of whole numbers or an ItemRange, got {item_range!r}"
            ) from None
        item_ranges.append(ItemRange(start, end))
    return item_ranges


def _to_int(number: object) -> int:
    """A plain int of any whole number, numpy's included.

    Raises:
        TypeError: It is none; True and False are none either.
    """
    if isinstance(number, bool):
        raise TypeError(f"not a whole number: {number!r}")
    return operator.index(number)  # type: ignore[arg-type]  # raises for what has no index
