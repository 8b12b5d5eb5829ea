"""Headers of safetensors files, as the metadata of a checkpoint: DCP plans a load from it as from ``.metadata``.

Most programs write whole tensors. torch's ``HuggingFaceStorageWriter`` can also have each rank save its pieces: then
several files have a tensor of the same name, and each says where in the whole tensor its piece begins. It does so in a
string of JSON, ``DCP_SHARDING_INFO`` in the ``__metadata__`` of its header::

    {"weight": {"saved_offsets": [512, 0]}, …}

Each header was checked before; this module compares them with each other. It must not read anything.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mpreader.dcp.planned import RawItem
from mpreader.errors import PlanError
from mpreader.formats.safetensors import Header, HeaderRefused
from mpreader.formats.torch_tensors import layout_of
from mpreader.readers.load_plan import is_extent

__all__ = ["metadata_of"]

log = logging.getLogger(__name__)

_SHARDING: Final = "DCP_SHARDING_INFO"
_OFFSETS: Final = "saved_offsets"


class _Piece(NamedTuple):
    """Piece of a tensor: the index of its first element in the whole tensor, and where it is stored."""

    offsets: torch.Size
    item: RawItem

    @property
    def sizes(self) -> torch.Size:
        return torch.Size(self.item.layout.size)


def metadata_of(headers: Mapping[str, Header]) -> Metadata:
    """Make the metadata of a checkpoint.

    Args:
        headers: Headers of its files, by their paths relative to the checkpoint.

    Returns:
        The metadata, whose ``storage_data`` has items of type :class:`RawItem`. A tensor of a type that this version of
        torch lacks is left out, and a warning is logged.

    Raises:
        HeaderRefused: The files contradict each other, or a piece of a tensor is missing.
    """
    pieces: dict[str, list[_Piece]] = {}
    for path, header in headers.items():
        for name, piece in _pieces_of(path, header):
            pieces.setdefault(name, []).append(piece)
    return Metadata(
        state_dict_metadata={name: _entry_of(name, of_tensor) for name, of_tensor in pieces.items()},
        storage_data={
            MetadataIndex(name, piece.offsets): piece.item for name, of_tensor in pieces.items() for piece in of_tensor
        },
    )


def _pieces_of(path: str, header: Header) -> Iterator[tuple[str, _Piece]]:
    offsets = _saved_offsets(path, header)
    begins: Any
    for stored in header.tensors.values():
        try:
            layout = layout_of(stored)
        except PlanError as error:
            log.warning("%s: left out: %s", path, error)
            continue
        begins = [0] * len(layout.size)
        if offsets is not None:
            begins = offsets.get(stored.name)
            if not _are_indices(begins, len(layout.size)):
                raise HeaderRefused(
                    f"{path}: {_SHARDING} says that the piece of {stored.name!r} of shape {list(layout.size)} begins "
                    f"at {begins!r}"
                )
        yield stored.name, _Piece(torch.Size(begins), RawItem(path, stored.start, stored.end - stored.start, layout))


def _are_indices(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_extent(index, 0) for index in value)


def _saved_offsets(path: str, header: Header) -> dict[str, Any] | None:
    """Returns the offsets of a file's pieces by name, not checked yet; None if the file has whole tensors."""
    told = header.metadata.get(_SHARDING)
    if not told:  # as torch reads it
        return None
    try:
        return {name: entry[_OFFSETS] for name, entry in json.loads(told).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderRefused(f"{path}: its {_SHARDING} is damaged: {error!r}") from error


def _entry_of(name: str, pieces: Sequence[_Piece]) -> TensorStorageMetadata:
    """Returns the entry of a tensor, after a check that its pieces are a whole tensor."""
    first = pieces[0]
    by_offsets: dict[torch.Size, _Piece] = {}
    for piece in pieces:
        if piece.item.layout.dtype != first.item.layout.dtype or len(piece.sizes) != len(first.sizes):
            _refuse(name, first, piece, "of another type or number of dimensions")
        other = by_offsets.setdefault(piece.offsets, piece)
        if other is not piece:
            _refuse(name, other, piece, "the same piece of it")
    ends = [[at + size for at, size in zip(piece.offsets, piece.sizes, strict=True)] for piece in pieces]
    size = torch.Size([max(of_dimension) for of_dimension in zip(*ends, strict=True)])
    elements = sum(piece.sizes.numel() for piece in pieces)
    # Where a piece is missing, a part of the target would keep what was in its memory.
    if elements != size.numel():
        files = ", ".join(piece.item.relative_path for piece in pieces)
        raise HeaderRefused(
            f"the pieces of {name!r}, in {files}, have {elements} elements, but a tensor of shape {list(size)} has "
            f"{size.numel()}: a file is missing, or belongs to another checkpoint"
        )
    chunks = [ChunkStorageMetadata(piece.offsets, piece.sizes) for piece in pieces]
    return TensorStorageMetadata(TensorProperties(dtype=first.item.layout.dtype), size, chunks)


def _refuse(name: str, one: _Piece, other: _Piece, reason: str) -> None:
    raise HeaderRefused(f"tensor {name!r} is in {one.item.relative_path} and in {other.item.relative_path}: {reason}")
