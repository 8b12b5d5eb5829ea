"""Constructor of the readers whose bytes worker processes receive, and the reads that it begins ahead of them.

When the load plan is known, the constructor asks the pool for all its ranges, in the order in which DCP will read
them, across all files. The readers of the files then take the parts as they arrive::

    storage reader ── plan ──> MultiprocessConstructor ── one ReadAhead per plan ──> pool
    storage reader ── file ──> MultiprocessS3Reader ── parts of the file ──> ReadAhead

A :class:`ReadAhead` ends when all of its files were read, when a reader has failed, or when another plan has come; what
it has downloaded for readers that are still open stays. The constructor may be dropped, closed or pickled meanwhile.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.errors import PoolClosed
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool, use_shared_pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Transfer
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, Part, plan_files
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader
from mpreader.readers.constructor import ItemRangeConstructor
from mpreader.readers.multiprocess import MultiprocessS3Reader
from mpreader.readers.protocols import PlanItem, StoredItem
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client

__all__ = ["MultiprocessConstructor", "ReadAhead"]


class ReadAhead:
    """Reads of one load plan, shared by the readers of its files."""

    def __init__(
        self,
        pool: Pool,
        client: BaseS3Client,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        gap: float,
        *,
        progress: bool | None = False,
    ) -> None:
        from mpreader.s3 import parse_s3_uri
        from mpreader.sources.s3 import S3Source

        self.ranges_by_file = ranges_by_file
        self.parts_by_file: dict[str, tuple[int, list[Part]]] = {}
        sources = [S3Source(client, *parse_s3_uri(uri)) for uri in ranges_by_file]
        slot_reads: list[SlotRead] = []
        plans = plan_files(ranges_by_file, max_gap_bytes=gap, part_bytes=pool.sizes.part_bytes)
        for number, (uri, plan) in enumerate(plans.items()):
            self.parts_by_file[uri] = (len(slot_reads), plan.parts)
            slot_reads.extend(SlotRead(number, part.size, (part,), part.over_read) for part in plan.parts)
        self._unread = {uri for uri, (_, parts) in self.parts_by_file.items() if parts}
        self._readers = 0
        self._is_retired = not slot_reads
        self.max_bytes = pool.sizes.max_bytes
        # torch.load needs the whole of an item at a time, however large it is.
        self.transfer: Transfer | None = pool.read(sources, slot_reads, grows=True) if slot_reads else None
        nbytes = sum(slot_read.nbytes for slot_read in slot_reads)
        self._progress = progress_bar(nbytes, "load", show=progress) if slot_reads else Progress()
        # It uses the pool by itself, besides the constructor: readers that are open outlive the one that made them.
        use_shared_pool(pool)
        self._release_pool = weakref.finalize(self, release_shared_pool, pool, keep_warm=True)

    @property
    def is_over(self) -> bool:
        """True if nothing more can be read with it."""
        return self._is_retired and not self._readers

    def take(self, index: int) -> memoryview:
        """Wait for the slot read ``index`` and take it; see :meth:`mpreader.pool.transfer.Transfer.take`.

        Raises:
            PoolClosed: The load plan has no bytes to read, or the load has ended.
            MpreaderError: The bytes can't be had.
        """
        if self.transfer is None:
            raise PoolClosed("the load plan has no bytes to read")
        on_wait = self._show_progress if self._progress.is_shown else None
        view = self.transfer.take_first((index,), on_wait=on_wait)[1]
        self._show_progress()
        return view

    def discard(self, start: int, stop: int) -> None:
        """Say that the slot reads [start, stop) won't be taken any more."""
        if self.transfer is not None:
            self.transfer.discard(start, stop)

    def open_file(self) -> None:
        """Say that a reader begins."""
        self._readers += 1

    def close_file(self, uri: str, *, has_failed: bool) -> None:
        """Say that a reader has ended; the last one, or one that ends in an exception, ends the downloads."""
        self._readers -= 1
        self._unread.discard(uri)
        if has_failed or not self._unread:
            self._is_retired = True
        self._close_if_over()

    def retire(self) -> None:
        """Say that another plan has come: the downloads end as soon as no reader is open."""
        self._is_retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self.is_over:
            self._progress.close()
            if self.transfer is not None:
                self.transfer.close()
            self._release_pool()

    def _show_progress(self) -> None:
        if self.transfer is not None and self._progress.is_shown:
            self._progress.advance_to(self.transfer.received_bytes)


class MultiprocessConstructor(ItemRangeConstructor):
    """Makes a :class:`MultiprocessS3Reader` for every file of a checkpoint.

    Works in mpreader's and in s3torchconnector's ``S3StorageReader``. In the latter it makes its own S3 client, because
    reading begins when the plan is known, before any file is opened. Readers of one process share a pool per settings.
    Serves one plan at a time: a new one ends the one before. Pickles without what is under way.

    Args:
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one; one of more than 2 MiB never
            is, since another request is cheaper.
        s3client_config: Settings of the S3 client. None: in mpreader's ``S3StorageReader`` those of the storage
            reader, in any other the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        progress: True shows a progress bar on stderr during a load, False shows none. None: on a terminal or in a
            notebook, and only in the first of several ranks.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: ``max_gap_size`` is negative.
    """

    reader_type = "multiprocess"

    # Set by _forget_state, for a new constructor and for one that was unpickled.
    _client: BaseS3Client | None
    _pool: Pool | None
    _leave_pool: weakref.finalize[..., MultiprocessConstructor]
    _read_ahead: ReadAhead | None
    _end_read_ahead: Callable[[], object]

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
        self._forget_state()

    def use_client(self, client: BaseS3Client) -> None:
        """Read through ``client``, unless an ``s3client_config`` was given."""
        if self._s3client_config is None:
            self._client = client

    def start(self) -> None:
        """Start the worker processes, without waiting for them, so that they are there when the plan is known.

        Raises:
            PoolError: They can't be started.
        """
        self._get_pool().start()

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Take over the ranges of a load plan and begin to read ahead; see the base class."""
        super().set_item_ranges_by_file(plan_items, storage_data, base_path)
        self._set_read_ahead(self._begin(self._item_ranges_by_file) if self._item_ranges_by_file else None)

    def stats(self) -> PoolStats:
        """Returns the counts of the last plan so far: bytes, over-read, requests, retries, waits, by worker."""
        ahead = self._read_ahead
        return PoolStats() if ahead is None or ahead.transfer is None else ahead.transfer.stats()

    def close(self) -> None:
        """End the downloads and this constructor's use of the pool; the next plan starts anew. Idempotent."""
        self._set_read_ahead(None)
        if self._pool is not None and self._leave_pool.detach():
            release_shared_pool(self._pool)
        self._pool = None

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
            # The reads of the plan are over or closed, or were begun by the process that has pickled this constructor:
            # the file gets reads of its own.
            ahead = self._begin({uri: item_ranges})
            self._set_read_ahead(ahead)
        # Not item_ranges: another thread's plan may have come meanwhile, and these reads may have none of its ranges.
        begun = ahead.ranges_by_file[uri]
        return MultiprocessS3Reader(bucket, key, begun, get_object_info, get_stream, read_ahead=ahead)

    def _begin(self, ranges_by_file: Mapping[str, Sequence[ItemRange]]) -> ReadAhead:
        if self._client is None:
            from mpreader.s3 import BaseS3Client

            self._client = BaseS3Client(s3client_config=self._s3client_config)
        return ReadAhead(self._get_pool(), self._client, ranges_by_file, self._max_gap_size, progress=self._progress)

    def _get_pool(self) -> Pool:
        if self._pool is None:
            config = self._s3client_config or (self._client.s3client_config if self._client is not None else None)
            self._pool = shared_pool(self._pool_config, config)
            # A constructor that is dropped without a close leaves the processes warm for the next load, until they have
            # been idle for long.
            self._leave_pool = weakref.finalize(self, release_shared_pool, self._pool, keep_warm=True)
        return self._pool

    def _set_read_ahead(self, ahead: ReadAhead | None) -> None:
        if self._read_ahead is not None:
            self._read_ahead.retire()
            self._end_read_ahead()
        self._read_ahead = ahead
        # A constructor that is dropped must not leave downloads behind; readers that are open still finish.
        self._end_read_ahead = weakref.finalize(self, ahead.retire) if ahead is not None else _nothing

    def _forget_state(self) -> None:
        self._client = None
        self._pool = None
        self._read_ahead = None
        self._end_read_ahead = _nothing

    def __getstate__(self) -> dict[str, Any]:
        # Processes and shared memory belong to this process; a copy elsewhere begins anew.
        here = ("_pool", "_leave_pool", "_read_ahead", "_end_read_ahead")
        return {name: value for name, value in self.__dict__.items() if name not in here}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_state()
        self.__dict__.update(state)


def _nothing() -> None:
    pass
