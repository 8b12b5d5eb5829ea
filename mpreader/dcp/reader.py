"""Storage reader: loads checkpoints from S3 for ``torch.distributed.checkpoint``.

DCP calls it in this order; with the multiprocess constructor, the downloads begin as soon as the plan is known::

    reset ──> read_metadata ──> set_up_storage_reader ──> prepare_local_plan ──> prepare_global_plan ──> read_data
               .metadata,                                  items sorted; the                              each item into
               through an allowlist                        constructor is told                            its target

With any other constructor, torch reads the files as it always does.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from typing import IO, TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.dcp.filesystem import Path, S3FileSystem
from mpreader.dcp.items import ItemLoader, ItemReader, PlannedItem
from mpreader.dcp.metadata import load_metadata
from mpreader.errors import ConfigError, PlanError
from mpreader.pool.stats import PoolStats
from mpreader.readers.client import S3Client
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.protocols import DCPS3ReaderConstructorProtocol, S3ReaderConstructorProtocol, StoredItem
from mpreader.readers.read_ahead import MultiprocessConstructor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["S3StorageReader"]

log = logging.getLogger(__name__)


class S3StorageReader(FileSystemReader):
    """Storage reader of a checkpoint on S3, for ``storage_reader=`` of ``torch.distributed.checkpoint.load``.

    It serves any number of loads, one at a time: a load that another thread overtakes on the same reader, before it
    reads, ends in ``PlanError``. Give each thread a reader of its own.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        path: ``s3://`` URI of the checkpoint.
        s3client_config: Settings of the S3 client.
        reader_constructor: Makes the readers of the files. None: ``S3ReaderConstructor.multiprocess()``.
        pool_config: Settings of the worker pool, for the default constructor.
        verify: True checks the CRC-32s that ``torch.save`` wrote, where the default (or another multiprocess)
            constructor is used; torch itself does not look at them.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may make besides DCP's own.
        progress: True shows a progress bar on stderr during a load, False shows none, where the default constructor is
            used. None: on a terminal or in a notebook, and only in the first of several ranks.
        kwargs: Further arguments of torch's ``FileSystemReader``, according to torch's version.

    Raises:
        ValueError: ``path`` is not an ``s3://`` URI.
        ConfigError: ``pool_config`` or ``progress`` is given, but also a constructor, which has its own.
    """

    def __init__(
        self,
        region: str | None,
        path: Path,
        s3client_config: S3ClientConfig | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
        *,
        pool_config: PoolConfig | None = None,
        verify: bool = True,
        allowed_globals: Iterable[str] = (),
        progress: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, **kwargs)
        client = S3Client(region, s3client_config=s3client_config)
        if reader_constructor is None:
            reader_constructor = S3ReaderConstructor.multiprocess(pool_config=pool_config, progress=progress)
        elif progress is not None:
            raise ConfigError("give progress to the reader_constructor: S3ReaderConstructor.multiprocess(…)")
        elif pool_config is not None:
            raise ConfigError("give pool_config to the reader_constructor: S3ReaderConstructor.multiprocess(…)")
        self._reader_constructor = reader_constructor
        self._verify = verify
        if isinstance(allowed_globals, str):
            raise ConfigError(f"allowed_globals is a collection of names: write ({allowed_globals!r},)")
        self._allowed_globals = tuple(allowed_globals)
        self._fs = S3FileSystem(s3_client=client, reader_constructor=reader_constructor)
        self.fs = self._fs  # type: ignore[assignment]
        self.path = self._fs.init_path(path)
        self._began_s = time.monotonic()
        self._last_began_in: tuple[int, int] | None = None  # process and thread of the load that began last

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Returns True if it is a URI of S3."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin another load, of another checkpoint if one is named; ``load`` calls it first."""
        self._last_began_in = os.getpid(), threading.get_ident()
        self._began_s = time.monotonic()
        super().reset(checkpoint_id)

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata`` through an allowlist.

        Raises:
            MetadataRefused: It is damaged, or names a class or a path that it may not.
            TransportError: It can't be read.
        """
        if isinstance(self._reader_constructor, MultiprocessConstructor):
            self._reader_constructor.use_client(self._fs.client)
            self._reader_constructor.start()  # they start while .metadata is read and the plan is made
        rank = kwargs.get("rank")  # given where the ranks saved without telling each other
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with self._fs.create_stream(self._fs.concat_path(self.path, name), "rb") as stream:
            raw = cast("IO[bytes]", stream)
            with collector_paused():  # it makes an object for each item, and no garbage
                metadata = load_metadata(raw, allowed_globals=self._allowed_globals)
                spare_new_objects()
        if getattr(metadata, "storage_meta", None) is None:  # from here on as in torch's own reader
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Put the items in the order in which they are stored, and begin to read them ahead.

        Raises:
            PlanError: Another thread has begun a load on this reader meanwhile.
        """
        path, storage_data = self._own_load()
        if isinstance(self._reader_constructor, MultiprocessConstructor):
            # For each load: another storage reader, of another service, may share the constructor.
            self._reader_constructor.use_client(self._fs.client)
        with collector_paused():
            items = sorted(plan.items, key=lambda request: _location(storage_data[request.storage_index]))
            plan = dataclasses.replace(plan, items=items)
            if isinstance(self._reader_constructor, DCPS3ReaderConstructorProtocol):
                self._reader_constructor.set_item_ranges_by_file(plan.items, storage_data, path)
            spare_new_objects()
        return plan

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all items of the plan into the planner's targets.

        Raises:
            ChecksumMismatch: An item's bytes don't match their CRC-32, also when received again.
            PlanError: A target has not the shape of what it is to be read into it; or another thread has begun a load
                on this reader meanwhile.
            TransportError: Bytes can't be had.
        """
        path, storage_data = self._own_load()
        if not isinstance(self._reader_constructor, MultiprocessConstructor):
            return super().read_data(plan, planner)
        items_by_file: dict[str, list[PlannedItem]] = {}
        for request in plan.items:
            stored = storage_data[request.storage_index]
            items_by_file.setdefault(stored.relative_path, []).append(PlannedItem(request, stored))
        loader = ItemLoader(planner, getattr(self, "transforms", None), verify=self._verify)
        for relative_path, items in items_by_file.items():
            uri = self._fs.concat_path(path, relative_path)
            with self._fs.create_stream(uri, "rb") as reader:
                for item in items:
                    loader.load(item, uri, cast("ItemReader", reader))
        log.info("loaded %s in %.2f s: %s", path, time.monotonic() - self._began_s, self.stats)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def stats(self) -> PoolStats:
        """Counts of the last load so far: bytes, over-read, requests, retries, waits, each worker's share.

        All zero with another constructor than the multiprocess one.
        """
        constructor = self._reader_constructor
        return constructor.stats() if isinstance(constructor, MultiprocessConstructor) else PoolStats()

    def close(self) -> None:
        """End the downloads, the use of the worker pool, and connections; a later load starts anew. Idempotent."""
        close = getattr(self._reader_constructor, "close", None)  # most constructors have nothing to close
        if close is not None:
            close()
        self._fs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _own_load(self) -> tuple[Path, dict[MetadataIndex, StoredItem]]:
        """Returns the path and the storage data of the load that this thread has begun.

        Raises:
            PlanError: Another thread has begun a load meanwhile.
        """
        own = self.path, cast("dict[MetadataIndex, StoredItem]", self.storage_data)
        # Checked after they were taken: another load that begins later does not change what was taken.
        if self._last_began_in not in (None, (os.getpid(), threading.get_ident())):
            raise PlanError(
                "another thread has begun a load on this S3StorageReader: it serves one load at a time; give each "
                "thread a reader of its own"
            )
        return own


def _location(stored: StoredItem) -> tuple[str, int]:
    return stored.relative_path, stored.offset
