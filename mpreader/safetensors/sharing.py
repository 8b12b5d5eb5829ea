"""Sharing: the ranks of a host load together, each byte once, as those of a DCP load do.

::

    headers         each rank    finds out what it wants of which tensor
    Host.meet       all ranks    tell each other how they can be reached, through the process group or under a name
    fill_shared     all ranks    one of them receives for all, the others copy from its shared memory

A rank that can't share loads by itself; the reason is logged at level DEBUG.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.dcp.filesystem import S3FileSystem
from mpreader.dcp.load import Load
from mpreader.dcp.planned import RawItem
from mpreader.errors import ConfigError
from mpreader.fetch.safetensors import StoredFile
from mpreader.pool.hosts.identity import HostOffer, HostShare, group
from mpreader.pool.hosts.meeting import meet
from mpreader.ranks import local_rank, local_ranks
from mpreader.readers.client import S3Client
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.multiprocess_constructor import MultiprocessConstructor
from mpreader.safetensors.wanted import WantedTensor
from mpreader.sources.uri import without_secrets

__all__ = ["Host", "fill_shared", "host_of", "taking_part"]

log = logging.getLogger(__name__)


class Host:
    """Ranks of a job that load together on this host, and the way in which they find each other.

    Args:
        share_host: True: through the process group. A string: under that name.
        process_group: The group; None: the default one.
        host_ranks: Number of ranks of this host that meet under the name; None: the number that the launcher has set.

    Attributes:
        has_met: True as soon as this rank has told the others of itself.

    Raises:
        ConfigError: There is no process group, the number of ranks is unknown, or arguments contradict each other.
    """

    def __init__(self, share_host: bool | str, process_group: Any, host_ranks: int | None) -> None:
        self.has_met = False
        self._name = share_host if isinstance(share_host, str) else None
        self._group = process_group
        if self._name is None:
            if not (dist.is_available() and dist.is_initialized()):
                raise ConfigError(
                    "share_host=True finds the other ranks by torch.distributed, which is not initialized: call "
                    'init_process_group first, or write share_host="a name that all ranks of this job know"'
                )
            if host_ranks is not None:
                raise ConfigError("host_ranks is for ranks that meet by a name: a process group knows its ranks")
            self._ranks = dist.get_world_size(process_group)
            return
        if process_group is not None:
            raise ConfigError("ranks meet by a name or by a process group, not by both")
        self._ranks = local_ranks().number if host_ranks is None else host_ranks
        if host_ranks is None and not local_ranks().source:
            raise ConfigError("host_ranks must say how many ranks of this host meet: no launcher tells")
        if isinstance(self._ranks, bool) or not isinstance(self._ranks, int) or self._ranks < 1:
            raise ConfigError(f"host_ranks is a number of ranks, at least 1, got {host_ranks!r}")

    @property
    def has_others(self) -> bool:
        """True if this rank is not the only one."""
        return self._ranks > 1

    @property
    def is_likely_leader(self) -> bool:
        """True if this rank is likely to receive for the others."""
        local = local_rank()
        return local == 0 or (local is None and self._name is None and dist.get_rank(self._group) == 0)

    def meet(self, offer: HostOffer | None) -> HostShare | None:
        """Meet the others; all ranks must call it.

        Args:
            offer: What this rank tells of itself; None if it can't share.

        Returns:
            The share of this rank; None if there is nobody to share with.
        """
        self.has_met = True
        if self._name is not None:
            try:
                return meet(self._name, self._ranks, offer)
            except OSError as error:
                log.debug("this rank reads by itself: sockets are refused: %s", error)
                return None
        offers: list[HostOffer | None] = [None] * self._ranks
        dist.all_gather_object(offers, offer, group=self._group)
        return group(offers)[dist.get_rank(self._group)]


def host_of(uri: str, share_host: bool | str, process_group: Any, host_ranks: int | None) -> Host | None:
    """Return the ranks that load together, by the arguments of a load; None if this one loads by itself.

    Raises:
        ConfigError: The arguments contradict each other, or the ranks can't share what is at ``uri``.
    """
    if not share_host:
        if process_group is not None or host_ranks is not None:
            raise ConfigError("process_group and host_ranks are for ranks that share: write share_host=True, or a name")
        return None
    if not uri.startswith("s3://"):
        raise ConfigError(
            f"ranks share what they load from s3:// only, and {without_secrets(uri)!r} is not: leave share_host out"
        )
    host = Host(share_host, process_group, host_ranks)
    return host if host.has_others else None


@contextlib.contextmanager
def taking_part(host: Host | None) -> Iterator[Host | None]:
    """Let the other ranks, which wait for all, go on without this one if it fails before it has met them."""
    try:
        yield host
    except Exception as error:
        if host is not None and not host.has_met:
            log.debug("this rank has failed: %s", error)
            with contextlib.suppress(Exception):  # the first error tells more
                host.meet(None)
        raise


class _Targets:
    """Planner of a load, as far as :class:`~mpreader.dcp.load.Load` needs one: it knows the target of each tensor."""

    def __init__(self, wanted: Sequence[WantedTensor]) -> None:
        self._targets = {one.stored.name: one.target for one in wanted}

    def resolve_tensor(self, request: ReadItem) -> torch.Tensor:
        """Return the target of a tensor."""
        return self._targets[request.dest_index.fqn]

    def commit_tensor(self, request: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the tensor was loaded into its target."""


def fill_shared(
    host: Host,
    files: Sequence[StoredFile],
    wanted: Sequence[WantedTensor],
    *,
    progress: bool | None,
    s3client_config: S3ClientConfig | None,
    pool_config: PoolConfig | None,
) -> None:
    """Load tensors into their targets, together with the other ranks of this host.

    Args:
        host: The ranks. All of them must make this call.
        files: The files; the versions whose headers were read are the ones that are loaded.
        wanted: The tensors that this rank wants; there may be none.
        progress: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.

    Raises:
        TransportError: The bytes could not be received.
        PoolError: The worker pool has failed.
        ArenaError: Shared memory is used up.
    """
    if not files:  # by the index, none has what this rank wants: the others need not wait for it
        host.meet(None)
        return
    constructor = S3ReaderConstructor.multiprocess(pool_config=pool_config, progress=progress)
    client = S3Client(None, s3client_config=s3client_config)
    constructor.use_client(client)
    constructor.use_versions({file.uri: file.version for file in files})
    fs = S3FileSystem(s3_client=client, reader_constructor=constructor)
    load = _load_of(files, wanted, fs, constructor)
    with contextlib.closing(fs), contextlib.closing(constructor), contextlib.ExitStack() as stack:
        stack.callback(load.close)
        items = [_read_item(one) for one in wanted if one.target.numel()]
        offer = load.offer()
        share = host.meet(offer)
        if offer is None:
            load.begin(items)
        load.read(LoadPlan(items, storage_data=share), _Targets(wanted))  # type: ignore[arg-type]
        if share is not None and share.place == 0:
            # Closing it would end the read of all ranks. It ends by itself when the others have what they want.
            stack.pop_all()


def _load_of(
    files: Sequence[StoredFile],
    wanted: Sequence[WantedTensor],
    fs: S3FileSystem,
    constructor: MultiprocessConstructor,
) -> Load:
    """Return a load of the tensors as DCP would make it if they were a checkpoint of its own."""
    directory, paths = _paths_of(files)
    stored = {
        MetadataIndex(one.stored.name): RawItem(
            paths[one.file.uri], one.stored.start, one.stored.end - one.stored.start, one.layout
        )
        for one in wanted
    }
    return Load(
        fs.init_path(directory),
        stored,
        {one.stored.name: _entry_of(one) for one in wanted},
        fs,
        constructor,
        verify=False,  # the format has no checksums
        transforms=None,
        began_s=time.monotonic(),
    )


def _paths_of(files: Sequence[StoredFile]) -> tuple[str, dict[str, str]]:
    """Return the URI of the directory of all files, and their paths in it."""
    # An index may name files in folders of their own.
    folders = zip(*(file.uri.split("/")[:-1] for file in files), strict=False)
    directory = "/".join(names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, folders))
    return directory, {file.uri: file.uri[len(directory) + 1 :] for file in files}


def _entry_of(one: WantedTensor) -> TensorStorageMetadata:
    size = torch.Size(one.layout.size)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=one.layout.dtype), size, [chunk])


def _read_item(one: WantedTensor) -> ReadItem:
    index = MetadataIndex(one.stored.name)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size([0] * len(one.asked.box)),
        storage_index=index,
        storage_offsets=torch.Size(one.asked.offsets),
        lengths=torch.Size(one.asked.lengths),
    )
