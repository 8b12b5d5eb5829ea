"""Engine of the fetchers: owns the worker pool and the sources of a RangeFetcher or an AsyncRangeFetcher.

It turns the arguments of a call into a plan, and begins the read of that plan. Taking the bytes that arrive is left to
the fetchers: the engine must not wait for bytes. It may wait for the sizes of objects, which asyncio does in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ArenaExhausted, PlanError
from mpreader.fetch.arguments import FetchOptions, Ranges, needs_size, to_item_ranges
from mpreader.fetch.plan import Batch, FetchPlan, cut_into_pieces, plan_batches
from mpreader.fetch.sources import Sources
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.transfer import Transfer
from mpreader.ranges import ItemRange
from mpreader.sources.versions import PinnedSource, resolve_versions
from mpreader.telemetry.progress import Progress, progress_bar

__all__ = ["Engine"]

# Pieces into which a range is cut at most; more would take gigabytes, and no buffer has room for so many.
_MOST_PIECES: Final = 1 << 24


class Engine:
    """Plans and begins the calls of one fetcher. Thread-safe.

    It is pickled as its settings, and makes a pool and clients of its own where it is unpickled; of a closed one, the
    copy is closed.

    Args:
        s3client_config: Settings of the S3 client and of its sources. None: the defaults.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: Progress bars of calls: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.
        shares_pool: True: use the shared pool of the process, which keeps running when the engine is closed. "host":
            that which receives for all ranks of the host. False: make a pool for this engine only.
        known: Ready-made sources by name; see :class:`Sources`.
        http_headers: Further headers for web servers; they are not pickled, since they may be secrets.

    Attributes:
        pool: Worker pool that fetches the bytes.
        sources: Maker of the sources; owns the S3 client.

    Raises:
        ConfigError: A setting is wrong, or the host has too little memory.
        TypeError: A configuration is something else.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | None,
        pool_config: PoolConfig | None,
        *,
        progress: bool | None = False,
        shares_pool: bool | Literal["host"] = False,
        known: Mapping[str, Source] | None = None,
        http_headers: Mapping[str, str] | None = None,
    ) -> None:
        make_pool = partial(shared_pool, for_host=shares_pool == "host") if shares_pool else Pool
        self.pool = make_pool(pool_config, s3client_config)
        # Importing boto3 and making a client takes 0.15 s: the workers start up in the meantime.
        self.sources = Sources(
            s3client_config or S3ClientConfig(),
            known,
            on_client_needed=self.pool.start,
            http_headers=http_headers,
        )
        self._configs = s3client_config, pool_config
        self._known = known
        self._progress = progress
        self._shares_pool = shares_pool

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (*self._configs, self._progress, self._shares_pool, self._known, self.pool.is_closed)

    def close(self) -> None:
        """Close the pool and the connections of the S3 client. A shared pool is only released."""
        if self._shares_pool:
            # Not stopped: the next call of fetch_ranges() is faster when the workers are still running.
            release_shared_pool(self.pool, keep_warm=True)
        else:
            self.pool.close()
            self.sources.close()

    def stat(self, uri: str, options: FetchOptions) -> ObjectVersion:
        """Ask the server for the size and the ETag of an object."""
        return self._resolve([self.sources.source(uri)], options)[0].version

    def stat_many(self, uris: Sequence[str], options: FetchOptions) -> dict[str, ObjectVersion]:
        """Ask for the sizes and ETags of several objects at once."""
        pinned = self._resolve([self.sources.source(uri) for uri in uris], options)
        return {uri: source.version for uri, source in zip(uris, pinned, strict=True)}

    def plan_fetch(self, ranges_by_source: Mapping[str, Ranges], options: FetchOptions, *, has_room: bool) -> FetchPlan:
        """Plan a fetch, which holds all of its ranges at the same time.

        Args:
            ranges_by_source: Ranges by URI.
            options: Options of the call.
            has_room: True if the caller has given buffers for the ranges. The bytes are copied there piece by piece, so
                that ranges may be larger than shared memory.

        Raises:
            ArenaExhausted: The ranges are to be held in shared memory, and exceed its limit.
        """
        plan = self._plan(ranges_by_source, options, cuts_ranges=has_room)
        if not has_room:
            self._check_bytes(plan.slot_bytes)
        return plan

    def plan_stream(self, ranges_by_source: Mapping[str, Ranges], options: FetchOptions) -> FetchPlan:
        """Plan a stream, which hands out its ranges one after the other.

        Raises:
            ArenaExhausted: A single range exceeds the limit of shared memory.
        """
        plan = self._plan(ranges_by_source, options)
        self._check_bytes(plan.largest_range_bytes)
        return plan

    def begin(self, plan: FetchPlan) -> Transfer:
        """Begin the downloads of a plan. The caller must close the transfer."""
        return self.pool.read(plan.sources, [batch.slot_read for batch in plan.batches])

    def progress_of(self, transfer: Transfer) -> Progress:
        """Make the progress bar of a transfer, which does nothing if none is to be shown. The caller must close it."""
        return progress_bar(transfer.nbytes, "fetch", show=self._progress)

    def _plan(
        self, ranges_by_source: Mapping[str, Ranges], options: FetchOptions, *, cuts_ranges: bool = False
    ) -> FetchPlan:
        """Plan a call. With ``cuts_ranges`` the ranges are first cut into pieces of at most one request each."""
        sources, ranges_of = self._with_sizes(ranges_by_source, options)
        sizes = self.pool.sizes
        # Before it is cut: a range of absurd size would be cut into parts without number.
        largest = max((item_range.size for ranges in ranges_of for item_range in ranges), default=0)
        if not cuts_ranges:
            self._check_bytes(largest)
        elif largest > _MOST_PIECES * sizes.part_bytes:
            raise PlanError(f"a range of {largest} bytes is larger than any buffer")
        batches: list[Batch] = []
        origins = []
        for source_index, ranges in enumerate(ranges_of):
            pieces, origins_of_pieces = cut_into_pieces(ranges, sizes.part_bytes) if cuts_ranges else (ranges, [])
            batches += plan_batches(
                source_index,
                pieces,
                order=options.order,
                max_gap_bytes=options.max_gap_size,
                part_bytes=sizes.part_bytes,
                slot_bytes=sizes.block_bytes,
            )
            origins.append(origins_of_pieces)
        return FetchPlan(list(ranges_by_source), sources, ranges_of, batches, origins)

    def _with_sizes(
        self, ranges_by_source: Mapping[str, Ranges], options: FetchOptions
    ) -> tuple[list[Source], list[list[ItemRange]]]:
        """Return the sources and their checked ranges.

        The size of an object is asked for only where a range counts from its end: other ranges need no HEAD request
        before the first bytes.
        """
        # Copied to lists, because ranges may be an iterator, and they are gone through twice.
        wanted = [None if ranges is None else list(ranges) for ranges in ranges_by_source.values()]
        sources: list[Source] = [self.sources.source(uri) for uri in ranges_by_source]
        sizes: list[int | None] = [None] * len(sources)
        unsized = [index for index, ranges in enumerate(wanted) if needs_size(ranges)]
        for index, pinned in zip(unsized, self._resolve([sources[i] for i in unsized], options), strict=True):
            # The pinned source reads only the version that had this size. Of a later version, the same range from the
            # end would be other bytes.
            sources[index], sizes[index] = pinned, pinned.version.size
        return sources, [to_item_ranges(ranges, size) for ranges, size in zip(wanted, sizes, strict=True)]

    def _resolve(self, sources: list[Source], options: FetchOptions) -> list[PinnedSource]:
        # Closing the fetcher in another thread ends the wait: resolve_versions asks for is_closed now and then.
        return resolve_versions(sources, options.deadline, lambda: self.pool.is_closed)

    def _check_bytes(self, wanted: int) -> None:
        # Refused before any download: otherwise the call would fail only when memory is full and lease_timeout_s over.
        if wanted > self.pool.sizes.max_bytes:
            raise ArenaExhausted(
                f"{wanted} bytes are asked for at one time, {self.pool.sizes.max_bytes} may be held: use stream() "
                "with smaller ranges, or raise PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            )


def _rebuild(
    s3client_config: S3ClientConfig | None,
    pool_config: PoolConfig | None,
    progress: bool | None,
    shares_pool: bool | Literal["host"],
    known: Mapping[str, Source] | None,
    is_closed: bool,
) -> Engine:
    """Make an engine from what was pickled of one."""
    engine = Engine(s3client_config, pool_config, progress=progress, shares_pool=shares_pool, known=known)
    if is_closed:
        engine.close()
    return engine
