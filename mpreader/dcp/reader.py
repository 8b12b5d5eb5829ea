"""Loads checkpoints from S3.

With the multiprocess constructor, tensors are decoded where their bytes have arrived, without ``torch.load``::

    plan ── sorted ──> constructor reads ahead
    file ──> MultiprocessS3Reader.item ──> decode_layout ──> planner.resolve_tensor ──> copy_into (CRC) ──> commit
                                                └ None: torch.load, its CRCs checked beforehand

With any other constructor, torch reads as it always does.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import threading
import time
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.dcp.filesystem import Path, S3FileSystem
from mpreader.dcp.metadata import load_metadata
from mpreader.dcp.record import BufferItem, ItemBytes, RecordCorrupted, decode_layout
from mpreader.dcp.tensor import check_archive, copy_into, load_whole
from mpreader.errors import ArenaError, ChecksumMismatch, ConfigError, PlanError, PoolError, TransportError
from mpreader.pool.stats import PoolStats
from mpreader.readers.client import S3Client
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.protocols import DCPS3ReaderConstructorProtocol
from mpreader.readers.read_ahead import MultiprocessConstructor
from mpreader.s3 import parse_s3_uri

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

    from mpreader.config import PoolConfig, S3ClientConfig
    from mpreader.readers.protocols import S3ReaderConstructorProtocol

__all__ = ["S3StorageReader"]

log = logging.getLogger(__name__)


class _ItemReader(Protocol):
    """A reader that hands out items in place (``MultiprocessS3Reader``)."""

    def item(self, offset: int, length: int) -> ItemBytes:
        """The item's bytes."""

    def refetch(self, offset: int, length: int) -> ItemBytes:
        """The item's bytes, received once more."""


class _Stored(Protocol):
    """Where an item is stored (torch's ``_StorageInfo``)."""

    relative_path: str
    offset: int
    length: int


class _Item(NamedTuple):
    """An item of the plan, and where it is stored."""

    request: ReadItem
    stored: _Stored


class S3StorageReader(FileSystemReader):
    """Pass it as ``storage_reader`` to ``torch.distributed.checkpoint.load``; serves any number of loads.

    It serves one at a time: a load that another thread overtakes on the same reader, before it reads, ends in
    ``PlanError``. Give each thread a reader of its own.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        path: ``s3://`` URI of the checkpoint.
        s3client_config: How S3 is reached.
        reader_constructor: How files are read. None: ``S3ReaderConstructor.multiprocess()``.
        pool_config: Settings of the worker pool, for the default constructor.
        verify: Whether the CRC-32s that ``torch.save`` wrote are checked, where the default (or another
            multiprocess) constructor is used; torch itself does not look at them.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may make besides DCP's own.
        progress: Whether a load shows a progress bar on stderr, where the default constructor is used. None: on a
            terminal or in a notebook, and only in the first of several ranks.
        kwargs: What torch's ``FileSystemReader`` takes besides, according to torch's version.

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
        self._loader: tuple[int, int] | None = None  # process and thread of the load that began last

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Whether it is a URI of S3."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin another load, of another checkpoint if one is named; ``load`` calls it first."""
        self._loader = os.getpid(), threading.get_ident()
        self._began_s = time.monotonic()
        super().reset(checkpoint_id)

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata`` through an allowlist.

        Raises:
            MetadataRefused: It is damaged, or names a class or a place that it may not.
            TransportError: It can't be read.
        """
        if isinstance(self._reader_constructor, MultiprocessConstructor):
            self._reader_constructor.use_client(self._fs.client)
            self._reader_constructor.start()  # the processes are up when the plan is made
        rank = kwargs.get("rank")  # given where the ranks saved without telling each other
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with self._fs.create_stream(self._fs.concat_path(self.path, name), "rb") as stream:
            raw = cast("IO[bytes]", stream)
            with collector_paused():
                metadata = load_metadata(raw, allowed_globals=self._allowed_globals)
                spare_new_objects()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Put the items in the order in which they are stored, and begin to read them ahead.

        Raises:
            PlanError: Another thread has begun a load on this reader meanwhile.
        """
        path, storage_data = self._place_of_load()
        if isinstance(self._reader_constructor, MultiprocessConstructor):
            # Not once and for all: another storage reader, of another service, may share the constructor.
            self._reader_constructor.use_client(self._fs.client)
        with collector_paused():
            items = sorted(plan.items, key=lambda request: _place(storage_data[request.storage_index]))
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
        path, storage_data = self._place_of_load()
        if not isinstance(self._reader_constructor, MultiprocessConstructor):
            return super().read_data(plan, planner)
        items_by_file: dict[str, list[_Item]] = {}
        for request in plan.items:
            stored = storage_data[request.storage_index]
            items_by_file.setdefault(stored.relative_path, []).append(_Item(request, stored))
        for relative_path, items in items_by_file.items():
            uri = self._fs.concat_path(path, relative_path)
            with self._fs.create_stream(uri, "rb") as reader:
                for item in items:
                    self._read_item(item, uri, cast("_ItemReader", reader), planner)
        log.info("loaded %s in %.2f s: %s", path, time.monotonic() - self._began_s, self.stats)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def stats(self) -> PoolStats:
        """What the worker processes did for the last load so far: bytes, over-read, requests, retries, waits.

        All zero with another constructor than the multiprocess one.
        """
        constructor = self._reader_constructor
        return constructor.stats() if isinstance(constructor, MultiprocessConstructor) else PoolStats()

    def close(self) -> None:
        """End what is under way, the use of the worker pool, and connections. A later load starts anew. Idempotent."""
        close = getattr(self._reader_constructor, "close", None)
        if close is not None:
            close()
        self._fs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _place_of_load(self) -> tuple[Path, dict[MetadataIndex, _Stored]]:
        """Where the checkpoint is, and what is where in it, for the load of this thread."""
        place = self.path, cast("dict[MetadataIndex, _Stored]", self.storage_data)
        # After they were taken: from then on, what another thread begins can't exchange them.
        if self._loader not in (None, (os.getpid(), threading.get_ident())):
            raise PlanError(
                "another thread has begun a load on this S3StorageReader: it serves one load at a time; give each "
                "thread a reader of its own"
            )
        return place

    def _read_item(self, item: _Item, uri: str, reader: _ItemReader, planner: LoadPlanner) -> None:
        try:
            self._load_checked(item, uri, reader, planner)
        except ChecksumMismatch:
            raise  # names the tensor already
        except (TransportError, PoolError, ArenaError) as error:
            raise error.needed_for(item.request.storage_index.fqn) from error.__cause__

    def _load_checked(self, item: _Item, uri: str, reader: _ItemReader, planner: LoadPlanner) -> None:
        offset, length = item.stored.offset, item.stored.length
        try:
            self._load_item(item, reader.item(offset, length), planner)
        except RecordCorrupted:
            # Bits may have flipped on the way; if they did in the bucket, they are the same again.
            try:
                self._load_item(item, reader.refetch(offset, length), planner)
            except RecordCorrupted as error:
                raise _mismatch(item, uri, error) from error

    def _load_item(self, item: _Item, stored_bytes: ItemBytes, planner: LoadPlanner) -> None:
        request = item.request
        content = self._transformed(item, stored_bytes)
        if request.type == LoadItemType.BYTE_IO:
            value = io.BytesIO(content.view(0, content.size))
            if self._verify:
                check_archive(value)
            planner.load_bytes(request, value)
            return
        layout = decode_layout(content)
        if layout is not None:
            target = planner.resolve_tensor(request).detach()
            offsets, lengths = request.storage_offsets, request.lengths
            copy_into(content, layout, target, offsets, lengths, verify=self._verify)
        else:
            loaded = load_whole(content, verify=self._verify)
            loaded = narrow_tensor_by_index(loaded, request.storage_offsets, request.lengths)
            target = planner.resolve_tensor(request).detach()
            _check_shape(loaded, target)
            target.copy_(loaded)
        planner.commit_tensor(request, target)

    def _transformed(self, item: _Item, stored_bytes: ItemBytes) -> ItemBytes:
        """The item as it was before the extensions of the save (compression, say)."""
        descriptors = getattr(item.stored, "transform_descriptors", None)
        if not descriptors:
            return stored_bytes
        raw = io.BytesIO(stored_bytes.view(0, stored_bytes.size))
        stream = self.transforms.transform_load_stream(item.request, descriptors, raw)
        try:
            return BufferItem(bytearray(stream.read(-1)))
        except Exception as error:  # each extension has its own types
            raise RecordCorrupted(f"{', '.join(descriptors)} can't read it: {error}") from error


def _place(stored: _Stored) -> tuple[str, int]:
    return stored.relative_path, stored.offset


def _mismatch(item: _Item, uri: str, error: RecordCorrupted) -> ChecksumMismatch:
    bucket, key = parse_s3_uri(uri)
    start, end = item.stored.offset, item.stored.offset + item.stored.length
    return ChecksumMismatch(
        f"{item.request.storage_index.fqn!r} is damaged in {uri}, bytes {start}-{end}, also when received again: "
        f"{error}. Restore the file, or load from another checkpoint; verify=False does not check tensors",
        bucket=bucket,
        key=key,
        range=(start, end),
        attempts=2,
    )


def _check_shape(loaded: torch.Tensor, target: torch.Tensor) -> None:
    if loaded.size() != target.size():
        raise PlanError(f"a box of shape {list(loaded.size())} can't be read into {list(target.size())}")
