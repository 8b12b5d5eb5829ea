"""Constructor of the readers whose bytes worker processes receive: begins to read as soon as a load plan is known.

It is used by the storage readers of mpreader and s3torchconnector. When it is given a plan, it asks the pool for all
ranges of all files, in the order in which DCP will read them. The readers of the files then take the parts as they
arrive; the constructor must not wait for them::

    storage reader ── plan ──> MultiprocessConstructor ── one ReadAhead per plan ──> pool
    storage reader ── file ──> MultiprocessS3Reader ── parts of the file ──> ReadAhead
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool
from mpreader.pool.source import ObjectVersion
from mpreader.pool.stats import PoolStats, total
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader
from mpreader.readers.constructor import ItemRangeConstructor
from mpreader.readers.multiprocess import MultiprocessS3Reader
from mpreader.readers.protocols import PlanItem, StoredItem
from mpreader.readers.read_ahead import ReadAhead, steady_sources

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client
    from mpreader.sources.versions import SteadySource

__all__ = ["MultiprocessConstructor"]


def _nothing() -> None:
    pass


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
    _versions: Mapping[str, ObjectVersion]  # the only ones that are read, by URI
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

    def use_versions(self, versions: Mapping[str, ObjectVersion]) -> None:
        """Read only these versions of files, by URI; of other files it is the one that the first read finds."""
        self._versions = versions

    def sources(self, uris: Iterable[str], before: ReadAhead | None = None) -> dict[str, SteadySource]:
        """Returns the sources of some files; see :func:`~mpreader.readers.read_ahead.steady_sources`."""
        return steady_sources(self.client, uris, self._versions, before)

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
        """Setting of the progress bar: True shows it, False does not; None: on a terminal or in a notebook."""
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
        if ahead is None or uri not in ahead.parts_by_file or (ahead.is_over and ahead.parts_by_file[uri][1]):
            # There are no reads of the plan: they are over, though the file has bytes to read, or the constructor was
            # closed or unpickled since the plan came. The file gets reads of its own.
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
            self.sources(ranges_by_file, before),
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
        self._versions = {}
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
