"""Constructor of the readers whose bytes worker processes receive: begins to read as soon as a load plan is known.

It is used by the storage readers of mpreader and s3torchconnector. When it is given a plan, it asks the pool for all
ranges of all files, in the order in which DCP will read them. The readers of the files then take the parts as they
arrive; the constructor must not wait for them::

    storage reader ── plan ──> MultiprocessConstructor ── one ReadAhead per plan ──> pool
    storage reader ── file ──> MultiprocessS3Reader ── parts of the file ──> ReadAhead

A :class:`ReadAhead` belongs to the readers as well as to the constructor, which may be dropped, closed or pickled while
readers are open::

    active ── all files read, a reader failed, another plan, constructor closed ──► retired
    retired, and no reader is open ──► over: the downloads end, the pool is released
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.errors import PoolClosed
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool, use_shared_pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.stats import PoolStats, total
from mpreader.pool.transfer import Transfer
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, Part, plan_files
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader
from mpreader.readers.constructor import ItemRangeConstructor
from mpreader.readers.multiprocess import MultiprocessS3Reader
from mpreader.readers.protocols import PlanItem, StoredItem
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client
    from mpreader.sources.versions import SteadySource

__all__ = ["MultiprocessConstructor", "ReadAhead", "load_progress", "steady_sources"]


def _nothing() -> None:
    pass


class ReadAhead:
    """Reads of one load plan, shared by the readers of its files.

    Args:
        ranges_by_file: Ranges of the plan by URI, in the order in which DCP will read them.
        parts_by_file: Parts of each file by URI. Each part is one slot read, and they follow each other.
        sources: Sources of the files, at least; may hold others of the same load.
        begin: Begins the reads; not called if there are no parts.
        max_bytes: Largest number of bytes of shared memory that the pool may reserve.
        progress: Progress bar.
        before_take: Called before each part is taken: views of parts that came before may have ended.
        release: Called once when the reads are over.
        abandon: Called in its place if they were dropped, in the middle of a garbage collection: must not wait. None:
            the same.

    Attributes:
        ranges_by_file: The ranges of the plan.
        parts_by_file: Parts of each file by URI, with the index of the slot read of the first part.
        sources: The sources, which know the versions that are read.
        max_bytes: Largest number of bytes of shared memory that the pool may reserve.
        transfer: The read in progress; None if the plan has no bytes to read.
    """

    def __init__(
        self,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        parts_by_file: Mapping[str, list[Part]],
        sources: Mapping[str, SteadySource],
        begin: Callable[[], Transfer],
        *,
        max_bytes: int,
        progress: Progress,
        before_take: Callable[[], object] = _nothing,
        release: Callable[[], object] = _nothing,
        abandon: Callable[[], object] | None = None,
    ) -> None:
        self.ranges_by_file = ranges_by_file
        self.sources = sources
        self.max_bytes = max_bytes
        self.parts_by_file: dict[str, tuple[int, list[Part]]] = {}
        first = 0
        for uri, parts in parts_by_file.items():
            self.parts_by_file[uri] = first, parts
            first += len(parts)
        # Files whose reader was not closed yet. Files without bytes don't count: nothing is downloaded for them.
        self._unread = {uri for uri, parts in parts_by_file.items() if parts}
        self._readers = 0  # readers that are open
        self._is_retired = not first
        self._progress = progress
        self._before_take = before_take
        self._release = release
        self._finalizer = weakref.finalize(self, abandon or release)
        # Last: whatever fails after it, a Ctrl-C for one, would leave a read that nobody closes.
        self.transfer: Transfer | None = begin() if first else None

    @classmethod
    def of_pool(
        cls,
        pool: Pool,
        client: BaseS3Client,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        max_gap_bytes: float,
        *,
        max_gap_by_file: Mapping[str, float] = MappingProxyType({}),
        before: ReadAhead | None = None,
        progress: bool | None = False,
    ) -> ReadAhead:
        """Read by a pool.

        Args:
            pool: Shared pool that reads.
            client: S3 client that signs the requests.
            ranges_by_file: Ranges of the plan by URI, in the order in which DCP will read them.
            max_gap_bytes: Largest gap between two ranges that are fetched as one.
            max_gap_by_file: Smaller bounds for some files, by URI.
            before: Reads of the same load that came before these: they have decided which versions of its files are
                read.
            progress: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.
        """
        sources = steady_sources(client, ranges_by_file, before)
        plans = plan_files(
            ranges_by_file,
            max_gap_bytes=max_gap_bytes,
            part_bytes=pool.sizes.part_bytes,
            max_gap_by_file=max_gap_by_file,
        )
        slot_reads = [
            SlotRead(number, part.size, (part,), part.over_read)
            for number, plan in enumerate(plans.values())
            for part in plan.parts
        ]
        bar = load_progress(sum(slot_read.nbytes for slot_read in slot_reads), show=progress)
        # A user of the pool besides the constructor, because readers that are open may outlive the constructor.
        use_shared_pool(pool)
        return cls(
            ranges_by_file,
            {uri: plan.parts for uri, plan in plans.items()},
            # With those of files that are not read now, but perhaps by the reads that come next.
            sources if before is None else {**before.sources, **sources},
            # It may grow beyond max_memory, because an item that is read in pieces smaller than its parts is held until
            # the next one.
            lambda: pool.read(list(sources.values()), slot_reads, grows=True),
            max_bytes=pool.sizes.max_bytes,
            progress=bar,
            release=partial(release_shared_pool, pool, keep_warm=True),
        )

    @property
    def is_over(self) -> bool:
        """True if nothing more can be read with it: it is retired, and no reader is open."""
        return self._is_retired and not self._readers

    def take(self, index: int) -> memoryview:
        """Wait for the slot read ``index`` and take it; see :meth:`mpreader.pool.transfer.Transfer.take`.

        Raises:
            PoolClosed: The load plan has no bytes to read, or the load has ended.
            MpreaderError: The bytes could not be fetched.
        """
        if self.transfer is None:
            raise PoolClosed("the load plan has no bytes to read")
        self._before_take()
        on_wait = self._show_progress if self._progress.is_shown else None
        view = self.transfer.take_first((index,), on_wait=on_wait)[1]
        self._show_progress()  # on_wait is not called for a part that has arrived already
        return view

    def discard(self, start: int, stop: int) -> None:
        """Tell the pool that the slot reads [start, stop) won't be taken any more."""
        if self.transfer is not None:
            self.transfer.discard(start, stop)

    def open_file(self) -> None:
        """Count a reader that was opened."""
        self._readers += 1

    def close_file(self, uri: str, *, has_failed: bool) -> None:
        """Count a reader that was closed; retires after that of the last file, or one that has failed."""
        self._readers -= 1
        self._unread.discard(uri)
        if has_failed or not self._unread:
            self._is_retired = True
        self._close_if_over()

    def retire(self) -> None:
        """End the downloads as soon as no reader is open: another plan has come, or the constructor is gone."""
        self._is_retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self.is_over:
            self._progress.close()
            if self.transfer is not None:
                self.transfer.close()
            if self._finalizer.detach():
                self._release()

    def _show_progress(self) -> None:
        if self.transfer is not None and self._progress.is_shown:
            self._progress.advance_to(self.transfer.received_bytes)


def load_progress(nbytes: int, *, show: bool | None) -> Progress:
    """Returns the progress bar of a load of ``nbytes``; for ``show`` see the constructor."""
    return progress_bar(nbytes, "load", show=show) if nbytes else Progress()


def steady_sources(
    client: BaseS3Client, uris: Iterable[str], before: ReadAhead | None = None
) -> dict[str, SteadySource]:
    """Returns the sources of some files, those of ``before`` where it has some, so that the same versions are read."""
    # Imported here, because they import boto3, which takes 0.1 s: a constructor can be made without it.
    from mpreader.s3 import parse_s3_uri
    from mpreader.sources.s3 import S3Source
    from mpreader.sources.versions import SteadySource

    known = before.sources if before is not None else {}
    return {uri: known.get(uri) or SteadySource(S3Source(client, *parse_s3_uri(uri))) for uri in uris}


class MultiprocessConstructor(ItemRangeConstructor):
    """Constructor that makes a :class:`MultiprocessS3Reader` for every file of a checkpoint.

    It works in the ``S3StorageReader`` of mpreader and in that of s3torchconnector. In the latter it makes its own S3
    client, because reading begins when the plan is known, before any file is opened. All constructors of a process that
    have the same settings share a pool. A constructor serves one plan at a time: a new plan ends the reads of the one
    before. A pickled copy has the settings and the ranges, but no reads.

    Args:
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one. A gap of more than 2 MiB is
            never fetched, because another request is cheaper.
        s3client_config: Settings of the S3 client. None: those of the storage reader in mpreader's ``S3StorageReader``;
            in any other, the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: True shows a progress bar on stderr during a load, False shows none. None: on a terminal or in a
            notebook, and only in the first of several ranks.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: ``max_gap_size`` is negative.
    """

    reader_type = "multiprocess"

    # State that does not come from the arguments; _reset() sets it in a new constructor and in an unpickled one.
    _client: BaseS3Client | None  # made when it is first needed, unless use_client() has set it
    # Its own one, and that which receives for all ranks of the host (True); each is made when it is first needed, and
    # released by its finalizer when the constructor is dropped.
    _pools: dict[bool, tuple[Pool, weakref.finalize[..., MultiprocessConstructor]]]
    _read_ahead: ReadAhead | None  # reads of the last plan
    _end_read_ahead: Callable[[], object]  # retires _read_ahead, also when the constructor is dropped
    _stats_before: tuple[PoolStats, ...]  # of reads of the same load that came before _read_ahead

    def __init__(
        self,
        max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
        *,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
        progress: bool | None = None,
    ) -> None:
        super().__init__(max_gap_size)
        check_type("s3client_config", s3client_config, S3ClientConfig)
        check_type("pool_config", pool_config, PoolConfig)
        self._s3client_config = s3client_config
        self._pool_config = pool_config
        self._progress = progress
        self._reset()

    def use_client(self, client: BaseS3Client) -> None:
        """Make the requests by ``client``, unless an ``s3client_config`` was given."""
        if self._s3client_config is None:
            self._client = client

    def start(self, *, for_host: bool = False) -> None:
        """Start the worker processes without waiting for them, so that they are running when the plan is known.

        Args:
            for_host: Those that receive for all ranks of the host.

        Raises:
            PoolError: The processes can't be started.
        """
        self._get_pool(for_host=for_host).start()

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Replace the ranges of the load plan and begin to read them; see the base class."""
        super().set_item_ranges_by_file(plan_items, storage_data, base_path)
        self._stats_before = ()
        self._set_read_ahead(self._begin(self._item_ranges_by_file) if self._item_ranges_by_file else None)

    def set_ranges_by_file(
        self,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        max_gap_by_file: Mapping[str, float],
        *,
        continues: bool = False,
    ) -> None:
        """Replace the ranges by others than those of whole items, and begin to read them.

        Args:
            ranges_by_file: At least one range by the URI of its file, in the order in which they will be read.
            max_gap_by_file: Smaller bounds than ``max_gap_size`` for some files, by URI.
            continues: True: these reads belong to the same load as the last ones. The same versions of the files are
                read, and :meth:`stats` counts both.

        Raises:
            PoolError: The worker processes can't be started.
        """
        before = self._read_ahead if continues else None
        self._stats_before = (self.stats(),) if continues else ()
        self._item_ranges_by_file = {uri: list(ranges) for uri, ranges in ranges_by_file.items()}
        self._set_read_ahead(self._begin(self._item_ranges_by_file, max_gap_by_file, before))

    def read_by(self, ahead: ReadAhead) -> None:
        """Let others do the reads of a load plan: the ranks of a host, together."""
        self._stats_before = ()
        self._item_ranges_by_file = {uri: list(ranges) for uri, ranges in ahead.ranges_by_file.items()}
        self._set_read_ahead(ahead)

    @property
    def client(self) -> BaseS3Client:
        """The client that makes the requests; made when it is first needed."""
        if self._client is None:
            # Imported here, because it imports boto3, which start() does not need.
            from mpreader.s3 import BaseS3Client

            self._client = BaseS3Client(s3client_config=self._s3client_config)
        return self._client

    @property
    def max_gap_size(self) -> float:
        """Largest gap, in bytes, between two items that are fetched as one."""
        return self._max_gap_size

    @property
    def progress(self) -> bool | None:
        """Whether a progress bar is shown; None: it depends."""
        return self._progress

    def host_pool(self) -> Pool:
        """Returns the pool that receives for all ranks of this host.

        Raises:
            ConfigError: The host has too little memory.
        """
        return self._get_pool(for_host=True)

    def stats(self) -> PoolStats:
        """Returns the statistics of the last plan so far: bytes, requests, retries and waits, also for each worker."""
        ahead = self._read_ahead
        stats = PoolStats() if ahead is None or ahead.transfer is None else ahead.transfer.stats()
        return total([*self._stats_before, stats]) if self._stats_before else stats

    def close(self) -> None:
        """End the downloads, and the workers if no other user of their pool is left. Idempotent.

        Readers that are open can still be used. The constructor can be used again: the next plan starts the workers.
        """
        self._set_read_ahead(None)
        # A finalizer that has been detached won't release the pool once more when the constructor is dropped.
        pools, self._pools = self._pools, {}
        for pool, leave in pools.values():
            if leave.detach():
                release_shared_pool(pool)

    def _make_reader(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
    ) -> S3Reader:
        uri = f"s3://{bucket}/{key}"
        ahead = self._read_ahead
        if ahead is None or ahead.is_over or uri not in ahead.parts_by_file:
            # There are no reads of the plan: they are over, or the constructor was closed or unpickled since the plan
            # came. The file gets reads of its own.
            ahead = self._begin({uri: item_ranges})
            self._set_read_ahead(ahead)
        # Not item_ranges: another thread may have passed another plan since they were looked up. A reader must only
        # read ranges that its reads have parts for.
        begun = ahead.ranges_by_file[uri]
        return MultiprocessS3Reader(bucket, key, begun, get_object_info, get_stream, read_ahead=ahead)

    def _begin(
        self,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        max_gap_by_file: Mapping[str, float] = MappingProxyType({}),
        before: ReadAhead | None = None,
    ) -> ReadAhead:
        """Begin to read the ranges; makes the S3 client and the pool if there are none."""
        return ReadAhead.of_pool(
            self._get_pool(),
            self.client,
            ranges_by_file,
            self._max_gap_size,
            max_gap_by_file=max_gap_by_file,
            before=before,
            progress=self._progress if before is None else False,
        )

    def _get_pool(self, *, for_host: bool = False) -> Pool:
        if for_host not in self._pools:
            config = self._s3client_config or (self._client.s3client_config if self._client is not None else None)
            pool = shared_pool(self._pool_config, config, for_host=for_host)
            # When a constructor is dropped without close(), the processes keep running for the next load, and end when
            # they have been idle for the idle timeout.
            self._pools[for_host] = pool, weakref.finalize(self, release_shared_pool, pool, keep_warm=True)
        return self._pools[for_host][0]

    def _set_read_ahead(self, ahead: ReadAhead | None) -> None:
        """Replace the reads of the last plan, whose downloads end as soon as no reader is open."""
        if self._read_ahead is not None:
            # Retired directly, too: another thread may just have set new reads, and not yet their finalizer.
            self._read_ahead.retire()
            self._end_read_ahead()
        self._read_ahead = ahead
        # A constructor that is dropped must not leave downloads behind; readers that are open can still be used.
        self._end_read_ahead = weakref.finalize(self, ahead.retire) if ahead is not None else _nothing

    def _reset(self) -> None:
        self._client = None
        self._pools = {}
        self._read_ahead = None
        self._end_read_ahead = _nothing
        self._stats_before = ()

    def __getstate__(self) -> dict[str, Any]:
        # Processes and shared memory belong to this process. The S3 client pickles its settings only.
        here = ("_pools", "_read_ahead", "_end_read_ahead")
        return {name: value for name, value in self.__dict__.items() if name not in here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        self.__dict__.update(state)
