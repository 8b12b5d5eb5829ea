"""Summary of a load: the files and tensors of a checkpoint of any format, and the requests that a load of it makes.

``mpreader inspect`` prints it, as the summary of a DCP checkpoint or of safetensors files. The attributes must be plain
values, so that ``dataclasses.asdict`` gives values that ``json`` can write. It must work without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpreader.ranges import ItemRange, Part, coverage

__all__ = [
    "FileRequests",
    "FileSummary",
    "HostSummary",
    "LoadSummary",
    "PlannedRequest",
    "RankSummary",
    "ShardedLoadSummary",
    "TensorSummary",
    "sums_of",
]


@dataclass(frozen=True, slots=True)
class FileSummary:
    """File of a checkpoint.

    Attributes:
        path: Path of the file, relative to the checkpoint.
        items: Number of items stored in it: pieces of tensors, and items that are no tensors.
        nbytes: Bytes of these items, as they are stored.
    """

    path: str
    items: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """Tensor of a checkpoint.

    Attributes:
        fqn: Fully qualified name.
        dtype: Element type, such as ``"bfloat16"``; of safetensors files the name in the header, such as ``"BF16"``.
        shape: Shape of the whole tensor, all pieces together.
        nbytes: Bytes in memory.
        stored_nbytes: Bytes in the files. They differ from ``nbytes``, since each piece has a header and may be
            compressed, and pieces may be missing.
        chunks: Number of stored pieces.
        files: Paths of the files that hold the pieces, sorted.
        is_selected: True if the load that ``CheckpointSummary.load`` describes includes the tensor.
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
class PlannedRequest:
    """One GET of a byte range.

    Attributes:
        start: First byte, counted from the start of the file.
        end: End of the range, exclusive.
        over_read: Number of its bytes that belong to no item.
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
    """Requests of a load for one file.

    Attributes:
        path: Path of the file, relative to the checkpoint.
        groups: Number of groups of items that are fetched together, with the gaps between them.
        requests: Number of GETs.
        wanted_nbytes: Bytes of the items; a byte of several items counts once.
        fetched_nbytes: Bytes of the GETs.
        over_read_nbytes: Bytes of the GETs that belong to no item.
        parts: The byte ranges of the GETs, sorted.
    """

    path: str
    groups: int
    requests: int
    wanted_nbytes: int
    fetched_nbytes: int
    over_read_nbytes: int
    parts: tuple[PlannedRequest, ...]

    @classmethod
    def of(cls, path: str, ranges: Sequence[ItemRange], groups: int, parts: Sequence[Part]) -> FileRequests:
        """Make it from the ranges of a file, the number of their groups, and the requests planned for them."""
        return cls(
            path=path,
            groups=groups,
            requests=len(parts),
            wanted_nbytes=sum(interval.size for interval in coverage(ranges)),
            fetched_nbytes=sum(part.size for part in parts),
            over_read_nbytes=sum(part.over_read for part in parts),
            parts=tuple(PlannedRequest(part.start, part.end, part.over_read) for part in parts),
        )


def sums_of(files: tuple[FileRequests, ...]) -> dict[str, Any]:
    """Return the sums over all files, and the files, by their names in :class:`LoadSummary`."""
    return {
        "groups": sum(file.groups for file in files),
        "requests": sum(file.requests for file in files),
        "wanted_nbytes": sum(file.wanted_nbytes for file in files),
        "fetched_nbytes": sum(file.fetched_nbytes for file in files),
        "over_read_nbytes": sum(file.over_read_nbytes for file in files),
        "files": files,
    }


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Requests of a load in which no request is retried. Numbers and bytes are sums over all files.

    Attributes:
        match: Patterns that select the items to load; None: all items.
        tensors: Number of tensors.
        items: Number of items that are no tensors.
        nbytes: Bytes of the tensors in memory.
        part_size: Largest size of one GET, in bytes.
        max_gap_size: Largest gap, in bytes, between two items that are fetched together: the argument of this name, or
            what is chosen for safetensors files.
        metadata_requests: Number of GETs of what describes the tensors: ``.metadata``, or the headers of safetensors
            files.
        head_requests: Number of HEADs: one for each file of which anything is fetched.
        groups: Number of groups of items that are fetched together, with the gaps between them.
        requests: Number of GETs of the files.
        wanted_nbytes: Bytes of the items; a byte of several items counts once.
        fetched_nbytes: Bytes of the GETs.
        over_read_nbytes: Bytes of the GETs that belong to no item.
        files: Requests for each file, in the order in which the files are read.
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
class RankSummary:
    """Requests of one rank of a load in shards.

    Attributes:
        rank: The rank.
        nbytes: Bytes of its shards in memory.
        requests: Number of GETs of the files.
        fetched_nbytes: Bytes of the GETs.
    """

    rank: int
    nbytes: int
    requests: int
    fetched_nbytes: int


@dataclass(frozen=True, slots=True)
class HostSummary:
    """Requests of a load in shards by ranks that are all on one host, and receive together what they need.

    Attributes:
        nbytes: Bytes of the tensors in memory; what several ranks have counts once.
        requests: Number of GETs of the files.
        fetched_nbytes: Bytes of the GETs.
    """

    nbytes: int
    requests: int
    fetched_nbytes: int


@dataclass(frozen=True, slots=True)
class ShardedLoadSummary:
    """Requests of a load by several ranks, each of which has a shard of every tensor.

    Attributes:
        dim: Dimension in which the tensors are divided. Those that don't have it are loaded by every rank.
        nbytes: Bytes of the shards of all ranks in memory.
        fetched_nbytes: Bytes of the GETs of all ranks, if each is on a host of its own.
        ranks: The ranks, as if each were on a host of its own.
        host: Requests of the ranks if they are all on one host; None if there is one rank only.
    """

    dim: int
    nbytes: int
    fetched_nbytes: int
    ranks: tuple[RankSummary, ...]
    host: HostSummary | None
