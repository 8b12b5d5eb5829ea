"""Storage reader: loads checkpoints from S3 for ``torch.distributed.checkpoint`` (DCP).

Users pass it to ``load``; the functions for whole checkpoints use it, too. DCP calls its methods in this order::

    reset ──> read_metadata ──> set_up_storage_reader ──> prepare_local_plan ──> prepare_global_plan ──> read_data
              starts workers,                             sorts the items,                               copies items
              reads .metadata                             starts the downloads                           into targets

Workers and downloads are those of the multiprocess constructor, the default. With any other constructor, torch's own
``read_data`` reads the files. This module decides the order of the steps; it must not decode bytes itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import threading
import time
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, cast

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.dcp.filesystem import Path, S3FileSystem
from mpreader.dcp.load import Load, sorted_items
from mpreader.dcp.metadata import load_metadata
from mpreader.dcp.sharing import group_plans, has_other_ranks, is_likely_leader
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.pool.background import call_twice_if_slow
from mpreader.pool.source import ObjectVersion
from mpreader.pool.stats import PoolStats
from mpreader.readers.client import S3Client
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.multiprocess_constructor import MultiprocessConstructor
from mpreader.readers.protocols import DCPS3ReaderConstructorProtocol, S3ReaderConstructorProtocol, StoredItem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from typing_extensions import Self

    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["S3StorageReader"]

log = logging.getLogger(__name__)

# What is read of a file to know that the server is sending it.
_FIRST_BYTES: Final = 64 * 1024


class _Opened(NamedTuple):
    """A file that is being read: the stream, its first bytes, and what closes it."""

    stream: IO[bytes]
    first: bytes
    stack: contextlib.ExitStack


class S3StorageReader(FileSystemReader):
    """Storage reader of a checkpoint on S3, for ``storage_reader=`` of ``torch.distributed.checkpoint.load``.

    It serves any number of loads, one at a time. If another thread begins a load on the same reader before the first
    load has reached ``read_data``, the first load ends in ``PlanError``. Give each thread a reader of its own.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        path: ``s3://`` URI of the checkpoint.
        s3client_config: Settings of the S3 client.
        reader_constructor: Makes the readers of the files. None: ``S3ReaderConstructor.multiprocess()``.
        pool_config: Settings of the worker pool, for the default constructor.
        verify: True checks the CRC-32s that ``torch.save`` wrote, of all items that are received whole. Of an item of
            which a small box is wanted, only that is received, and no CRC can be checked; ``"whole"`` receives all
            items whole, and checks them. False checks nothing. Works with a multiprocess constructor only (the default
            is one); torch itself does not check them.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may use besides DCP's own.
        progress: True shows a progress bar on stderr during a load, False shows none, for the default constructor.
            None: on a terminal or in a notebook, and only in the first of several ranks.
        share_host: True: the ranks of a job that run on one host receive together what they need, each byte once, if
            the constructor is a multiprocess one. An item that one of them verifies for others, and finds damaged, is
            then loaded a second time by each. False: each rank receives by itself.
        kwargs: Further arguments of torch's ``FileSystemReader``, according to torch's version.

    Raises:
        ValueError: ``path`` is not an ``s3://`` URI.
        ConfigError: ``pool_config`` or ``progress`` is given beside a constructor, which has its own; or
            ``allowed_globals`` is a single string, or ``verify`` has another value.
    """

    def __init__(
        self,
        region: str | None,
        path: Path,
        s3client_config: S3ClientConfig | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
        *,
        pool_config: PoolConfig | None = None,
        verify: bool | Literal["whole"] = True,
        allowed_globals: Iterable[str] = (),
        progress: bool | None = None,
        share_host: bool = True,
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
        if not isinstance(verify, bool) and verify != "whole":
            raise ConfigError(f'verify must be True, False or "whole", got {verify!r}')
        self._verify = verify
        self._entries: Mapping[str, Any] = {}  # descriptions of the tensors, from .metadata
        self._versions: Mapping[str, ObjectVersion] = {}  # the only ones of files that may be read, by URI
        if isinstance(allowed_globals, str):  # would be taken for a collection of letters
            raise ConfigError(f"allowed_globals is a collection of names: write ({allowed_globals!r},)")
        self._allowed_globals = tuple(allowed_globals)
        # torch's methods use self.fs, whose declared type is torch's file system; self._fs has the right type.
        self._fs = S3FileSystem(s3_client=client, reader_constructor=reader_constructor)
        self.fs = self._fs  # type: ignore[assignment]
        self.path = self._fs.init_path(path)
        self._share_host = share_host
        self._load: Load | None = None  # the last one, if the constructor is a multiprocess one
        self._began_s = time.monotonic()
        # Process and thread that last called reset. None before the first call: a caller of the single steps may leave
        # reset out.
        self._last_began_in: tuple[int, int] | None = None
        self._metadata_error = ""  # text of the error of the last read of .metadata, if it is there

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Returns True if ``checkpoint_id`` is an ``s3://`` URI."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def reset(self, checkpoint_id: Path | None = None) -> None:
        """Begin another load; torch's ``load`` calls this first.

        Args:
            checkpoint_id: URI of the checkpoint. None: the same one as before.
        """
        self._last_began_in = os.getpid(), threading.get_ident()
        self._began_s = time.monotonic()
        super().reset(checkpoint_id)

    def read_metadata(self, *_: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``, with only those classes that a checkpoint needs.

        Raises:
            MetadataRefused: ``.metadata`` is damaged, or needs a class or names a path that is not allowed.
            TransportError: ``.metadata`` can't be read.
        """
        if isinstance(self._reader_constructor, MultiprocessConstructor):
            self._reader_constructor.use_client(self._fs.client)
            # Now, so that the worker processes start while .metadata is read and the plan is made.
            if not self._may_share():
                self._reader_constructor.start()
            elif self._leads():
                self._reader_constructor.start(for_host=True)
        rank = kwargs.get("rank")  # given if each rank has saved a .metadata of its own
        if rank is None:
            self._metadata_error = ""
        elif self._metadata_error:
            # torch takes every error of .metadata for "there is none", and asks for that of the rank in its place. That
            # one may be of another save, and must not be loaded because .metadata is damaged or could not be received.
            raise PlanError(
                f"no metadata of a rank is read in place of .metadata that is there: {self._metadata_error}"
            )
        try:
            metadata = self._load_metadata(".metadata" if rank is None else f"__{rank}.metadata")
        except ObjectMissing:
            raise
        except Exception as error:
            if rank is None:
                self._metadata_error = str(error)  # not the error, whose frames hold what was read
            raise
        # The rest is what torch's own read_metadata does.
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take over what ``.metadata`` says of the items."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._entries = metadata.state_dict_metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Sort the items by their location, and give the plan to the constructor if it reads ahead.

        Of items of which only a box is wanted, the multiprocess constructor is told to read no more than that, where
        it is cheaper.

        Raises:
            PlanError: Another thread has begun a load on this reader meanwhile.
        """
        path, storage_data = self._own_load()
        constructor = self._reader_constructor
        with collector_paused():
            plan = dataclasses.replace(plan, items=sorted_items(plan.items, storage_data))
            if isinstance(constructor, MultiprocessConstructor):
                load = self._begin_load(constructor, path, storage_data)
                offer = load.offer() if self._may_share() else None
                if offer is not None:  # who shares is known when all ranks have planned
                    return dataclasses.replace(plan, storage_data=offer)
                load.begin(plan.items)
            # By protocol, not by class: the user may pass a constructor of s3torchconnector.
            elif isinstance(constructor, DCPS3ReaderConstructorProtocol):
                constructor.set_item_ranges_by_file(plan.items, storage_data, path)
            spare_new_objects()
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Find out which ranks share a host. Called in the rank that plans."""
        return group_plans(super().prepare_global_plan(plans))

    def _may_share(self) -> bool:
        return self._share_host and isinstance(self._reader_constructor, MultiprocessConstructor) and has_other_ranks()

    def _leads(self) -> bool:
        """Returns True if this rank is likely to receive for all ranks of its host, if they share."""
        return is_likely_leader()

    def _begin_load(
        self, constructor: MultiprocessConstructor, path: Path, storage_data: Mapping[MetadataIndex, StoredItem]
    ) -> Load:
        # Set again for each load: another storage reader, with another endpoint, may share the constructor, and may
        # have set its client since read_metadata.
        constructor.use_client(self._fs.client)
        constructor.use_versions(self._versions)
        if self._load is not None:
            self._load.close()
        self._load = Load(
            path,
            storage_data,
            self._entries,
            self._fs,
            constructor,
            verify=self._verify,
            transforms=getattr(self, "transforms", None),  # older torch has no extensions
            began_s=self._began_s,
        )
        return self._load

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all items of the plan into the planner's targets.

        Raises:
            ChecksumMismatch: An item's bytes don't match their CRC-32, also when received again.
            PlanError: A target has another shape than what is to be read into it, a mode such as ``FakeTensorMode`` is
                active, or another thread has begun a load on this reader meanwhile.
            TransportError: Bytes could not be received.
        """
        path, storage_data = self._own_load()
        constructor = self._reader_constructor
        if not isinstance(constructor, MultiprocessConstructor):
            return super().read_data(plan, planner)
        load = self._load
        if load is None or not load.is_of(path, storage_data):  # a caller of the single steps may leave planning out
            load = self._begin_load(constructor, path, storage_data)
        load.read(plan, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @property
    def stats(self) -> PoolStats:
        """Counts of the last load so far: bytes, over-read, requests, retries, waits, each worker's share.

        Also how many bytes were verified, and how many were not. All of them are zero if the constructor is not a
        multiprocess one.
        """
        return self._load.stats if self._load is not None else PoolStats()

    @property
    def host_stats(self) -> PoolStats:
        """Counts of the read that the ranks of this host have shared, as far as this rank knows; else :attr:`stats`."""
        return self._load.host_stats if self._load is not None else PoolStats()

    def close(self) -> None:
        """End the downloads, leave the worker pool and close the connections. Idempotent; a later load starts anew."""
        load, self._load = self._load, None
        if load is not None:
            load.close()
        close = getattr(self._reader_constructor, "close", None)  # only some constructors have something to close
        if close is not None:
            close()
        self._fs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load_metadata(self, name: str) -> Metadata:
        raw = io.BytesIO(self._read(name))
        # This makes several objects for each item, and no garbage: the collector would only take time.
        with collector_paused():
            metadata = load_metadata(raw, allowed_globals=self._allowed_globals)
            spare_new_objects()
        return metadata

    def _read(self, name: str) -> bytes:
        """Read a whole file of the checkpoint; it is opened once more if its first bytes are slow to come."""
        path = self._fs.concat_path(self.path, name)

        def open_and_begin() -> _Opened:
            with contextlib.ExitStack() as stack:
                stream = cast("IO[bytes]", stack.enter_context(self._fs.create_stream(path, "rb")))
                return _Opened(stream, stream.read(_FIRST_BYTES), stack.pop_all())

        opened = call_twice_if_slow("mpreader-metadata", open_and_begin, lambda late: late.stack.close())
        with opened.stack:
            return opened.first + opened.stream.read()

    def _own_load(self) -> tuple[Path, dict[MetadataIndex, StoredItem]]:
        """Returns the path and the storage data of the load that this thread has begun.

        Without this check two threads could exchange the bytes of their checkpoints: path and storage data are
        attributes of the reader, which each ``reset`` sets anew.

        Raises:
            PlanError: Another thread has begun a load meanwhile.
        """
        own = self.path, cast("dict[MetadataIndex, StoredItem]", self.storage_data)
        # Checked after both were read: reset sets _last_began_in first, so if it still names this thread
        # now, no other load had begun when they were read.
        if self._last_began_in not in (None, (os.getpid(), threading.get_ident())):
            raise PlanError(
                "another thread has begun a load on this S3StorageReader: it serves one load at a time; give each "
                "thread a reader of its own"
            )
        return own
