"""Sources of a conversion to DCP: tensors of safetensors files, their pieces, and the buffers that pieces pass through.

The converter reads and writes; this module must not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Final, NamedTuple

import torch

from mpreader.dcp.state import name_patterns
from mpreader.errors import PlanError
from mpreader.fetch.safetensors import StoredFile
from mpreader.formats.safetensors import BITS, StoredTensor, packed_shape
from mpreader.formats.torch_tensors import torch_dtype
from mpreader.safetensors.conversion.pieces import BATCH_BYTES, Piece, batches_of, pieces_of

__all__ = ["BatchBuffers", "Source", "bytes_of", "source_batches", "sources_of"]

_ALIGNMENT: Final = 64  # bytes, of the pieces in a buffer


class Source(NamedTuple):
    """Tensor that is converted, and the file that it is stored in."""

    file: StoredFile
    stored: StoredTensor


def sources_of(files: Sequence[StoredFile], match: str | Iterable[str] | None) -> dict[str, Source]:
    """Return the tensors whose names match, by name, in the order of the files and of their bytes.

    Args:
        files: The files.
        match: Patterns of names. None: all.

    Raises:
        PlanError: No name matches, or torch has no type for a tensor.
    """
    patterns = name_patterns(match)
    sources = {
        stored.name: Source(file, stored)
        for file in files
        for stored in file.header.tensors.values()
        if patterns is None or any(fnmatchcase(stored.name, pattern) for pattern in patterns)
    }
    if not sources:
        raise PlanError(f"no tensor in {files[0].uri} or beside it" + (f" matches {match!r}" if match else ""))
    for file, stored in sources.values():
        if BITS[stored.dtype] < 8 and not (stored.dtype == "F4" and stored.shape and not stored.shape[-1] % 2):
            raise PlanError(
                f"{file.uri}: tensor {stored.name!r} is {stored.dtype} of shape {stored.shape}, for which torch has no "
                "type; select others (match=, --match)"
            )
        torch_dtype(stored)  # refuses what this torch does not know
    return sources


def source_batches(sources: Mapping[str, Source]) -> Iterator[list[Piece]]:
    """Yield the pieces of tensors in batches, in the order of the tensors."""
    pieces = (
        piece
        for _, stored in sources.values()
        for piece in pieces_of(stored.name, packed_shape(stored), torch_dtype(stored).itemsize, max_bytes=BATCH_BYTES)
    )
    return batches_of(pieces, max_bytes=BATCH_BYTES)


class BatchBuffers:
    """Two buffers, each for the pieces of a batch: one is filled while the other one is read.

    Args:
        sources: The tensors that the pieces belong to, by name.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        sizes = [sum(_padded(piece.nbytes) for piece in batch) for batch in source_batches(sources)]
        self._views = itertools.cycle([bytes_of(torch.empty(max(sizes), dtype=torch.uint8)) for _ in sizes[:2]])

    def tensors(self, batch: Sequence[Piece]) -> list[torch.Tensor]:
        """Return a tensor for each piece, valid until the next call but one.

        Each has a storage of just its size, since torch saves whole storages.
        """
        view, at = next(self._views), 0
        tensors = []
        for piece in batch:
            dtype = torch_dtype(self._sources[piece.name].stored)
            if piece.nbytes:
                data = torch.frombuffer(view[at : at + piece.nbytes], dtype=torch.uint8)
                tensors.append(data.view(dtype).view(piece.sizes))
            else:
                tensors.append(torch.empty(piece.sizes, dtype=dtype))
            at += _padded(piece.nbytes)
        return tensors


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
