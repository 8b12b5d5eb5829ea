"""Summary of a checkpoint: its contents, and the requests that a load of it makes.

:func:`mpreader.dcp.describe_checkpoint` makes it, and ``mpreader inspect`` prints it. The attributes must be plain
values, so that ``dataclasses.asdict`` gives values that ``json`` can write.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpreader.fetch.summary import (
    FileRequests,
    FileSummary,
    HostSummary,
    LoadSummary,
    PlannedRequest,
    RankSummary,
    ShardedLoadSummary,
    TensorSummary,
)

__all__ = [
    "CheckpointSummary",
    "FileRequests",
    "FileSummary",
    "HostSummary",
    "ItemSummary",
    "LoadSummary",
    "PlannedRequest",
    "RankSummary",
    "ShardedLoadSummary",
    "TensorSummary",
]


@dataclass(frozen=True, slots=True)
class ItemSummary:
    """Item of a checkpoint that is no tensor.

    Attributes:
        fqn: Fully qualified name.
        nbytes: Bytes in the file.
        file: Path of the file that holds it; None if it is described, but was not stored.
        is_selected: True if the load that ``CheckpointSummary.load`` describes includes the item.
    """

    fqn: str
    nbytes: int
    file: str | None
    is_selected: bool


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """Contents of a checkpoint, and the requests of a load of it.

    Attributes:
        uri: URI of the checkpoint.
        nbytes: Bytes of all tensors in memory.
        stored_nbytes: Bytes of all items in the files.
        files: Its files, sorted by path.
        tensors: Its tensors, in the order of ``.metadata``.
        items: Its items that are no tensors, in the same order.
        load: Requests of a load of the selected tensors and items.
        sharded: Requests of a load of them by several ranks; None if that was not asked for.
    """

    uri: str
    nbytes: int
    stored_nbytes: int
    files: tuple[FileSummary, ...]
    tensors: tuple[TensorSummary, ...]
    items: tuple[ItemSummary, ...]
    load: LoadSummary
    sharded: ShardedLoadSummary | None = None
