"""What fetchers are made of: a worker pool, an S3 client, and the planning of what is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mpreader.config import S3ClientConfig
from mpreader.errors import ArenaExhausted, ConfigError
from mpreader.fetch.plan import (
    Batch,
    RangeLike,
    StreamOrder,
    absolute,
    check_order,
    group_ranges,
    is_relative,
    pack,
    to_item_ranges,
)
from mpreader.fetch.stream import Order
from mpreader.pool.pool import Pool
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.transfer import Transfer
from mpreader.ranges import ItemRange, check_max_gap
from mpreader.sources.uri import source_of
from mpreader.sources.versions import resolve_versions
from mpreader.telemetry.progress import progress_bar

if TYPE_CHECKING:
    from mpreader.readers.client import S3Client

__all__ = ["Engine", "Ranges", "deadline_of"]

Ranges = Iterable[RangeLike] | None


class Engine:
    """Plans and begins what :class:`~mpreader.RangeFetcher` and its like are asked for. Thread-safe.

    Args:
        pool: Its workers fetch.
        s3client_config: How S3 is reached.
        progress: Whether calls show a progress bar; see :func:`~mpreader.telemetry.progress.progress_bar`.
        known: Sources to use for these URIs.
    """

    def __init__(
        self,
        pool: Pool,
        s3client_config: S3ClientConfig,
        *,
        progress: bool | None = False,
        known: Mapping[str, Source] | None = None,
    ) -> None:
        self.pool = pool
        self._s3client_config = s3client_config
        self._progress = progress
        self._known = known or {}
        self._client: S3Client | None = None

    def client(self) -> S3Client:
        """The S3 client, made when it is first needed."""
        client = self._client
        if client is None:
            from mpreader.readers.client import S3Client

            # Without a lock, which a fork could leave closed: two of them would share a session all the same.
            client = self._client = S3Client(s3client_config=self._s3client_config)
        return client

    def close_client(self) -> None:
        """Close the connections of the S3 client."""
        if self._client is not None:
            self._client.close()

    def stat(self, uri: str, deadline: float) -> ObjectVersion:
        """Ask for the version of an object."""
        return resolve_versions([self._source(uri)], deadline, lambda: self.pool.is_closed)[0].version

    def plan_fetch(
        self, ranges_by_source: Mapping[str, Ranges], max_gap_size: float, deadline: float, *, has_room: bool
    ) -> Order:
        """Plan what is held at one time, or, where the caller ``has_room`` for it, is copied there piece by piece.

        Raises:
            ArenaExhausted: It can't be held.
        """
        order = self._plan(ranges_by_source, max_gap_size, "completion", deadline, cuts=has_room)
        if not has_room:
            self._check_bytes(sum(batch.fill.nbytes for batch in order.batches))
        return order

    def plan_stream(
        self, ranges_by_source: Mapping[str, Ranges], max_gap_size: float, order: StreamOrder, deadline: float
    ) -> Order:
        """Plan what is taken range by range.

        Raises:
            ArenaExhausted: A range can't be held.
        """
        planned = self._plan(ranges_by_source, max_gap_size, order, deadline)
        self._check_bytes(max((item_range.size for ranges in planned.ranges for item_range in ranges), default=0))
        return planned

    def begin(self, order: Order) -> Transfer:
        """Begin to fetch; the caller closes the transfer."""
        transfer = self.pool.read([batch.fill for batch in order.batches])
        nbytes = sum(fill.nbytes for fill in transfer.fills)
        transfer.progress = progress_bar(nbytes, "fetch", show=self._progress)
        return transfer

    def _plan(
        self,
        ranges_by_source: Mapping[str, Ranges],
        max_gap_size: float,
        stream_order: StreamOrder,
        deadline: float,
        *,
        cuts: bool = False,
    ) -> Order:
        check_max_gap(max_gap_size)
        check_order(stream_order)
        wanted = {uri: None if ranges is None else list(ranges) for uri, ranges in ranges_by_source.items()}
        sources, item_ranges = self._resolve(wanted, deadline)
        sizes = self.pool.sizes
        batches: list[Batch] = []
        owners = []
        for number, (source, ranges) in enumerate(zip(sources, item_ranges, strict=True)):
            pieces, owner = _cut(ranges, sizes.part_bytes) if cuts else (ranges, [])
            groups = group_ranges(pieces, max_gap_size, stream_order)
            batches.extend(pack(number, source, groups, sizes.part_bytes, sizes.block_bytes))
            owners.append(owner)
        return Order(list(wanted), item_ranges, batches, owners)

    def _resolve(
        self, wanted: Mapping[str, list[RangeLike] | None], deadline: float
    ) -> tuple[list[Source], list[list[ItemRange]]]:
        """The sources, and their ranges from the first byte; asks for sizes where some are meant from the end."""
        sources: list[Source] = [self._source(uri) for uri in wanted]
        relative = [number for number, ranges in enumerate(wanted.values()) if is_relative(ranges)]
        sizes = {}
        pinned = resolve_versions([sources[number] for number in relative], deadline, lambda: self.pool.is_closed)
        for number, source in zip(relative, pinned, strict=True):
            sources[number], sizes[number] = source, source.version.size
        return sources, [
            to_item_ranges(absolute(ranges, sizes[number]) if number in sizes else ranges or ())
            for number, ranges in enumerate(wanted.values())
        ]

    def _check_bytes(self, wanted: int) -> None:
        if wanted > self.pool.sizes.max_bytes:
            raise ArenaExhausted(
                f"{wanted} bytes are asked for at one time, {self.pool.sizes.max_bytes} may be held: use stream() "
                "with smaller ranges, or raise PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            )

    def _source(self, uri: str) -> Source:
        if uri in self._known:
            return self._known[uri]
        return source_of(uri, self._starting_client, self._s3client_config.max_attempts)

    def _starting_client(self) -> S3Client:
        self.pool.start()  # while boto3 is imported and a client made
        return self.client()


def deadline_of(timeout_s: float | None) -> float:
    """When a call's time is up, by the monotonic clock.

    Raises:
        ConfigError: ``timeout_s`` is no number above 0.
    """
    if timeout_s is None:
        return math.inf
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ConfigError(f"timeout_s is a number of seconds above 0, or None, got {timeout_s!r}")
    return time.monotonic() + timeout_s


def _cut(ranges: Sequence[ItemRange], size: int) -> tuple[list[ItemRange], list[tuple[int, int]]]:
    """Pieces of at most ``size`` bytes, and for each the index of its range and its offset in it."""
    pieces, owners = [], []
    for index, item_range in enumerate(ranges):
        for start in range(item_range.start, item_range.end, size):
            pieces.append(ItemRange(start, min(start + size, item_range.end)))
            owners.append((index, start - item_range.start))
    return pieces, owners
