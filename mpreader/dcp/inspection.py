"""Inspection of a checkpoint: summarizes its contents and the requests of a load, from ``.metadata`` alone.

``mpreader inspect`` uses it, and users call :func:`describe_checkpoint`. It must not read any other file of the
checkpoint. It plans the load with the same functions as the load itself, so that the requests are exactly those that a
load with the same settings makes on this host.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.dcp.boxes import LoadRanges, load_ranges, needed_boxes, planned_items, select_boxes
from mpreader.dcp.host_plan import plan_host
from mpreader.dcp.loader import read_metadata
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.sharding import plan_shard, shard_bytes
from mpreader.dcp.sharing import need_of
from mpreader.dcp.state import empty_state, errors_as_refused, name_patterns, plan_whole, state_bytes
from mpreader.dcp.summary import (
    CheckpointSummary,
    FileRequests,
    FileSummary,
    HostSummary,
    ItemSummary,
    LoadSummary,
    RankSummary,
    ShardedLoadSummary,
    TensorSummary,
)
from mpreader.errors import ConfigError
from mpreader.fetch.summary import sums_of
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, check_max_gap, plan_files
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.readers.load_plan import item_ranges_by_file
from mpreader.readers.protocols import StoredItem

__all__ = ["describe_checkpoint"]

_METADATA_REQUESTS: Final = 1  # a load reads .metadata from its first byte to its last, by one GET


def describe_checkpoint(  # noqa: D417  # the other arguments are explained at load_checkpoint
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    allowed_globals: Iterable[str] = (),
    ranks: int | None = None,
    shard: int = 0,
) -> CheckpointSummary:
    """Summarize the contents of a checkpoint and the requests that a load of it makes; only ``.metadata`` is read.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        s3client_config: Settings of the S3 client; its ``part_size`` counts if ``pool_config`` sets none.
        pool_config: Settings of the worker pool of the load. A limit that they leave open is derived from this host, as
            it is now, and may bound the size of a request.
        match: Patterns that select the items of the load. The contents are summarized for all items.
        ranks: Number of ranks of a load in shards, which is summarized, too. None: none is.
        shard: Dimension in which each tensor is divided among them, as by DTensor's ``Shard``.

    All other arguments are those of :func:`load_checkpoint`.

    Raises:
        ConfigError: ``ranks`` or ``shard`` is too small.
        PlanError: Nothing matches.
        MetadataRefused: ``.metadata`` is damaged, or needs a class or names a path that is not allowed.
        TransportError: ``.metadata`` can't be read.
    """
    # Checked first: the constructor below takes neither of the two, and wrong ones should fail before any request.
    check_type("pool_config", pool_config, PoolConfig)
    check_max_gap(max_gap_size)
    if (ranks is not None and ranks < 1) or shard < 0:
        raise ConfigError(f"a load in shards needs at least one rank and dimension 0, got {ranks} and {shard}")
    patterns = name_patterns(match)
    # The default constructor would start worker processes, which are not needed for one file.
    constructor = S3ReaderConstructor.sequential()
    with S3StorageReader(region, uri, s3client_config, constructor, allowed_globals=allowed_globals) as reader:
        metadata = read_metadata(reader)
        selected = empty_state(metadata, patterns)
        plan = plan_whole(metadata, selected)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = reader.prepare_local_plan(plan)  # sorts the items, as in a load
        shards = [
            reader.prepare_local_plan(plan_shard(metadata, selected, shard, rank, ranks or 0)).items
            for rank in range(ranks or 0)
        ]
    part_size = size_pool(pool_config or PoolConfig(), s3client_config or S3ClientConfig(), Host.now()).part_bytes
    ranges_by_file = item_ranges_by_file(plan.items, metadata.storage_data, uri)
    files = _file_requests(os.fspath(uri), ranges_by_file, {}, max_gap_size, part_size)
    load = _load_summary(selected, files, match=patterns, part_size=part_size, max_gap_size=max_gap_size)
    sharded = None
    if shards:
        nbytes = [shard_bytes(selected, shard, rank, len(shards)) for rank in range(len(shards))]
        loads = [_shard_ranges(items, metadata, uri) for items in shards]
        requests = [_file_requests(os.fspath(uri), *ranges, max_gap_size, part_size) for ranges in loads]
        host = _host_summary(state_bytes(selected), shards, metadata, uri, max_gap_size, part_size)
        sharded = _sharded_summary(shard, nbytes, requests, host)
    with errors_as_refused(metadata):
        return _summarize(os.fspath(uri), metadata, selected, load, sharded)


def _shard_ranges(items: Sequence[ReadItem], metadata: Metadata, uri: str | os.PathLike[str]) -> LoadRanges:
    boxes = select_boxes(items, metadata.storage_data, metadata.state_dict_metadata)
    planned = planned_items(items, metadata.storage_data, boxes.selections)
    return load_ranges(planned, boxes.files, boxes.max_gap_bytes, uri)


def _host_summary(
    nbytes: int,
    shards: Sequence[Sequence[ReadItem]],
    metadata: Metadata,
    uri: str | os.PathLike[str],
    max_gap_size: float,
    part_size: int,
) -> HostSummary | None:
    """Plan what the ranks receive together, by the steps of a load; None if there are no others to share with."""
    if len(shards) == 1:
        return None
    storage_data = metadata.storage_data
    boxes = [needed_boxes(items, storage_data, metadata.state_dict_metadata) for items in shards]
    planned = [planned_items(items, storage_data, needed) for items, needed in zip(shards, boxes, strict=True)]
    needs = [need_of(items, uri) for items in planned]
    _, read = plan_host(needs, max_gap_bytes=max_gap_size, part_bytes=part_size)
    return HostSummary(nbytes, len(read.slot_reads), sum(slot_read.requested_bytes for slot_read in read.slot_reads))


def _sharded_summary(
    dim: int, nbytes: Sequence[int], requests: Sequence[tuple[FileRequests, ...]], host: HostSummary | None
) -> ShardedLoadSummary:
    ranks = tuple(
        RankSummary(
            rank,
            needed,
            requests=sum(file.requests for file in files),
            fetched_nbytes=sum(file.fetched_nbytes for file in files),
        )
        for rank, (needed, files) in enumerate(zip(nbytes, requests, strict=True))
    )
    return ShardedLoadSummary(dim, sum(nbytes), sum(rank.fetched_nbytes for rank in ranks), ranks, host)


def _file_requests(
    uri: str,
    ranges_by_file: Mapping[str, Sequence[ItemRange]],
    max_gap_by_file: Mapping[str, float],
    max_gap_size: float,
    part_size: int,
) -> tuple[FileRequests, ...]:
    """Plan the requests of a load for each file, in the order in which the files are read."""
    base = uri if uri.endswith("/") else f"{uri}/"
    plans = plan_files(
        ranges_by_file, max_gap_bytes=max_gap_size, part_bytes=part_size, max_gap_by_file=max_gap_by_file
    )
    return tuple(
        FileRequests.of(file.removeprefix(base), ranges_by_file[file], plan.groups, plan.parts)
        for file, plan in plans.items()
    )


def _load_summary(selected: Mapping[str, Any], files: tuple[FileRequests, ...], **settings: Any) -> LoadSummary:
    tensors = sum(value is not None for value in selected.values())
    return LoadSummary(
        tensors=tensors,
        items=len(selected) - tensors,
        nbytes=state_bytes(selected),
        metadata_requests=_METADATA_REQUESTS,
        head_requests=sum(file.requests > 0 for file in files),
        **sums_of(files),
        **settings,
    )


def _summarize(
    uri: str,
    metadata: Metadata,
    selected: Mapping[str, Any],
    load: LoadSummary,
    sharded: ShardedLoadSummary | None,
) -> CheckpointSummary:
    whole = empty_state(metadata)
    pieces: dict[str, list[StoredItem]] = {fqn: [] for fqn in whole}
    for index, stored in metadata.storage_data.items():
        # A forged .metadata may have places of items that it does not describe: those are counted in their file only.
        pieces.setdefault(index.fqn, []).append(stored)
    tensors = tuple(
        _tensor_summary(fqn, value, pieces[fqn], is_selected=fqn in selected)
        for fqn, value in whole.items()
        if value is not None
    )
    items = tuple(
        _item_summary(fqn, pieces[fqn], is_selected=fqn in selected) for fqn, value in whole.items() if value is None
    )
    files = _file_summaries(metadata.storage_data.values())
    stored_nbytes = sum(file.nbytes for file in files)
    return CheckpointSummary(uri, state_bytes(whole), stored_nbytes, files, tensors, items, load, sharded)


def _file_summaries(pieces: Iterable[StoredItem]) -> tuple[FileSummary, ...]:
    lengths: dict[str, list[int]] = {}
    for stored in pieces:
        lengths.setdefault(stored.relative_path, []).append(stored.length)
    return tuple(FileSummary(path, len(lengths[path]), sum(lengths[path])) for path in sorted(lengths))


def _tensor_summary(fqn: str, value: torch.Tensor, pieces: Sequence[StoredItem], *, is_selected: bool) -> TensorSummary:
    return TensorSummary(
        fqn=fqn,
        dtype=str(value.dtype).removeprefix("torch."),
        shape=tuple(value.shape),
        nbytes=value.nbytes,
        stored_nbytes=_stored_bytes(pieces),
        chunks=len(pieces),
        files=tuple(sorted({stored.relative_path for stored in pieces})),
        is_selected=is_selected,
    )


def _item_summary(fqn: str, pieces: Sequence[StoredItem], *, is_selected: bool) -> ItemSummary:
    file = pieces[0].relative_path if pieces else None
    return ItemSummary(fqn, _stored_bytes(pieces), file, is_selected)


def _stored_bytes(pieces: Iterable[StoredItem]) -> int:
    return sum(stored.length for stored in pieces)
