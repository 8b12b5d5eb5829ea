"""What a checkpoint holds, and what a load of it would ask for, told from its ``.metadata`` alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import empty_state, plan_whole, read_metadata, state_bytes
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, coverage, plan_files
from mpreader.readers.constructor import ItemRangeConstructor

__all__ = [
    "CheckpointSummary",
    "FileRequests",
    "FileSummary",
    "ItemSummary",
    "LoadSummary",
    "TensorSummary",
    "describe_checkpoint",
]

_METADATA_REQUESTS: Final = 1  # one stream from its first byte on


@dataclass(frozen=True, slots=True)
class FileSummary:
    """One file of a checkpoint.

    Attributes:
        path: Relative to the checkpoint.
        items: Number of items stored in it: pieces of tensors, and what is no tensor.
        nbytes: Bytes of these items, as they are stored.
    """

    path: str
    items: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """One tensor.

    Attributes:
        fqn: Its name.
        dtype: Its element type: ``"bfloat16"``.
        shape: Its whole shape, all pieces together.
        nbytes: Bytes in memory.
        stored_nbytes: Bytes in the files: each piece with a header, possibly compressed, or less than all of it.
        chunks: Number of pieces that it was saved in.
        files: The files that they are in, sorted.
        is_selected: Whether the plan loads it.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    stored_nbytes: int
    chunks: int
    files: tuple[str, ...]
    is_selected: bool


@dataclass(frozen=True, slots=True)
class ItemSummary:
    """One item that is no tensor.

    Attributes:
        fqn: Its name.
        nbytes: Bytes in the file.
        file: The file; None if it was stored nowhere.
        is_selected: Whether the plan loads it.
    """

    fqn: str
    nbytes: int
    file: str | None
    is_selected: bool


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One GET.

    Attributes:
        start: First byte.
        end: One past the last byte.
        over_read: Number of its bytes that are in gaps between items.
    """

    start: int
    end: int
    over_read: int = 0

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class FileRequests:
    """What a load asks for of one file.

    Attributes:
        path: The file, relative to the checkpoint.
        groups: Groups of items that are fetched as one.
        requests: Number of GETs.
        wanted_nbytes: Bytes of the items.
        fetched_nbytes: Bytes of the GETs.
        over_read_nbytes: Those of them that are in gaps between items.
        parts: The byte ranges of the GETs, sorted.
    """

    path: str
    groups: int
    requests: int
    wanted_nbytes: int
    fetched_nbytes: int
    over_read_nbytes: int
    parts: tuple[PlannedRequest, ...]


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What a load asks for, if nothing has to be asked for again.

    Attributes:
        match: The patterns that select what is loaded; None: everything is.
        tensors: Number of tensors.
        items: Number of items that are no tensors.
        nbytes: Bytes of the tensors in memory.
        part_size: Most bytes of one GET.
        max_gap_size: Largest gap, in bytes, that was asked for.
        metadata_requests: GETs of ``.metadata``.
        head_requests: HEADs, one for each file of which anything is fetched.
        groups: Groups of items that are fetched as one.
        requests: GETs of the files.
        wanted_nbytes: Bytes of the items.
        fetched_nbytes: Bytes of the GETs.
        over_read_nbytes: Those of them that are in gaps between items.
        files: The same for each file, in the order in which they are read.
    """

    match: tuple[str, ...] | None
    tensors: int
    items: int
    nbytes: int
    part_size: int
    max_gap_size: float
    metadata_requests: int
    head_requests: int
    groups: int
    requests: int
    wanted_nbytes: int
    fetched_nbytes: int
    over_read_nbytes: int
    files: tuple[FileRequests, ...]


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a checkpoint holds.

    Attributes:
        uri: The checkpoint.
        nbytes: Bytes of all tensors in memory.
        stored_nbytes: Bytes of all items in the files.
        files: Its files, by name.
        tensors: Its tensors, in the order of ``.metadata``.
        items: What is no tensor, in the same order.
        load: What a load asks for.
    """

    uri: str
    nbytes: int
    stored_nbytes: int
    files: tuple[FileSummary, ...]
    tensors: tuple[TensorSummary, ...]
    items: tuple[ItemSummary, ...]
    load: LoadSummary


def describe_checkpoint(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    allowed_globals: Iterable[str] = (),
) -> CheckpointSummary:
    """Tell what a checkpoint holds, and exactly what a load of it would ask S3 for; only ``.metadata`` is read.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        region: The bucket's region. None: the configuration's, or the environment's.
        s3client_config: How S3 is reached, and the size of a request.
        pool_config: Settings of the worker pool of that load. Where they leave the size of requests to the host, it is
            this host's, now.
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one.
        match: Plan only for what has a name that this pattern, or one of these, matches (``"model.*"``); what the
            checkpoint holds is told of all.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may make besides DCP's own.

    Raises:
        PlanError: Nothing matches.
        MetadataRefused: ``.metadata`` is damaged, or names a class or a place that it may not.
        TransportError: ``.metadata`` can't be read.
    """
    check_type("pool_config", pool_config, PoolConfig)
    constructor = _RangeRecorder(max_gap_size)
    patterns = None if match is None else ((match,) if isinstance(match, str) else tuple(match))
    with S3StorageReader(region, uri, s3client_config, constructor, allowed_globals=allowed_globals) as reader:
        metadata = read_metadata(reader)
        selected = empty_state(metadata, patterns)
        plan = plan_whole(metadata, selected)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        reader.prepare_local_plan(plan)
    part_size = size_pool(pool_config or PoolConfig(), s3client_config or S3ClientConfig(), Host.now()).part_bytes
    files = _file_requests(os.fspath(uri), constructor.ranges_by_file, max_gap_size, part_size)
    load = _load_summary(selected, files, match=patterns, part_size=part_size, max_gap_size=max_gap_size)
    return _summarize(os.fspath(uri), metadata, selected, load)


class _RangeRecorder(ItemRangeConstructor):
    """Is told what a load reads, as every constructor is, and reads nothing but ``.metadata``."""

    reader_type = "none"

    @property
    def ranges_by_file(self) -> Mapping[str, Sequence[ItemRange]]:
        """The ranges by URI, in the order in which they would be read."""
        return self._item_ranges_by_file

    def _make_reader(self, bucket: str, key: str, *_: Any) -> NoReturn:
        raise TypeError(f"s3://{bucket}/{key} is described, not read")


def _file_requests(
    uri: str, ranges_by_file: Mapping[str, Sequence[ItemRange]], max_gap_size: float, part_size: int
) -> tuple[FileRequests, ...]:
    base = uri if uri.endswith("/") else f"{uri}/"
    return tuple(
        FileRequests(
            path=file.removeprefix(base),
            groups=plan.groups,
            requests=len(plan.parts),
            wanted_nbytes=sum(interval.size for interval in coverage(ranges_by_file[file])),
            fetched_nbytes=sum(part.size for part in plan.parts),
            over_read_nbytes=sum(part.over_read for part in plan.parts),
            parts=tuple(PlannedRequest(part.start, part.end, part.over_read) for part in plan.parts),
        )
        for file, plan in plan_files(ranges_by_file, max_gap_bytes=max_gap_size, part_bytes=part_size).items()
    )


def _load_summary(selected: Mapping[str, Any], files: tuple[FileRequests, ...], **settings: Any) -> LoadSummary:
    tensors = sum(value is not None for value in selected.values())
    return LoadSummary(
        tensors=tensors,
        items=len(selected) - tensors,
        nbytes=state_bytes(selected),
        metadata_requests=_METADATA_REQUESTS,
        head_requests=sum(file.requests > 0 for file in files),
        groups=sum(file.groups for file in files),
        requests=sum(file.requests for file in files),
        wanted_nbytes=sum(file.wanted_nbytes for file in files),
        fetched_nbytes=sum(file.fetched_nbytes for file in files),
        over_read_nbytes=sum(file.over_read_nbytes for file in files),
        files=files,
        **settings,
    )


def _summarize(uri: str, metadata: Metadata, selected: Mapping[str, Any], load: LoadSummary) -> CheckpointSummary:
    whole = empty_state(metadata)
    pieces: dict[str, list[Any]] = {}
    for index, stored in metadata.storage_data.items():
        pieces.setdefault(index.fqn, []).append(stored)
    tensors = tuple(
        _tensor_summary(fqn, value, pieces.get(fqn, []), is_selected=fqn in selected)
        for fqn, value in whole.items()
        if value is not None
    )
    items = tuple(
        ItemSummary(fqn, _stored_bytes(stored), stored[0].relative_path if stored else None, fqn in selected)
        for fqn, stored in ((fqn, pieces.get(fqn, [])) for fqn, value in whole.items() if value is None)
    )
    files = _file_summaries(metadata.storage_data.values())
    stored_nbytes = sum(file.nbytes for file in files)
    return CheckpointSummary(uri, state_bytes(whole), stored_nbytes, files, tensors, items, load)


def _file_summaries(pieces: Iterable[Any]) -> tuple[FileSummary, ...]:
    lengths: dict[str, list[int]] = {}
    for stored in pieces:
        lengths.setdefault(stored.relative_path, []).append(stored.length)
    return tuple(FileSummary(path, len(lengths[path]), sum(lengths[path])) for path in sorted(lengths))


def _tensor_summary(fqn: str, value: torch.Tensor, pieces: Sequence[Any], *, is_selected: bool) -> TensorSummary:
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


def _stored_bytes(pieces: Iterable[Any]) -> int:
    return sum(stored.length for stored in pieces)
