"""Summary of a checkpoint: what it holds, and the requests that a load of it makes.

:func:`mpreader.dcp.describe_checkpoint` makes it, ``mpreader inspect`` prints it. Plain values only, so that
``dataclasses.asdict`` makes of it what JSON can say.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointSummary", "FileRequests", "FileSummary", "ItemSummary", "LoadSummary", "TensorSummary"]


@dataclass(frozen=True, slots=True)
class FileSummary:
    """File of a checkpoint.

    Attributes:
        path: Relative to the checkpoint.
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
        dtype: Element type: ``"bfloat16"``.
        shape: Shape of the whole tensor, all pieces together.
        nbytes: Bytes in memory.
        stored_nbytes: Bytes in the files. Each piece has a header and may be compressed; some may not be stored.
        chunks: Number of pieces that it was saved in.
        files: Files that the pieces are in, sorted.
        is_selected: True if the load of ``CheckpointSummary.load`` loads it.
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
    """Item of a checkpoint that is no tensor.

    Attributes:
        fqn: Fully qualified name.
        nbytes: Bytes in the file.
        file: File that it is in; None if it was stored nowhere.
        is_selected: True if the load of ``CheckpointSummary.load`` loads it.
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
    """Requests of a load for one file.

    Attributes:
        path: Path of the file, relative to the checkpoint.
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
    """Requests of a load, if no request has to be made again.

    Attributes:
        match: Patterns that select what is loaded; None: everything is.
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
class CheckpointSummary:
    """Contents of a checkpoint, and a load of it.

    Attributes:
        uri: URI of the checkpoint.
        nbytes: Bytes of all tensors in memory.
        stored_nbytes: Bytes of all items in the files.
        files: Its files, by name.
        tensors: Its tensors, in the order of ``.metadata``.
        items: Its items that are no tensors, in the same order.
        load: Requests of a load.
    """

    uri: str
    nbytes: int
    stored_nbytes: int
    files: tuple[FileSummary, ...]
    tensors: tuple[TensorSummary, ...]
    items: tuple[ItemSummary, ...]
    load: LoadSummary
