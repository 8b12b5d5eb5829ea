"""Pieces of tensors: boxes of bounded size that are contiguous in the file, and batches of them.

The converters move tensors piece by piece, so that their memory does not grow with the size of a tensor. This module is
pure, and must work without torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from mpreader.config import MiB

__all__ = ["BATCH_BYTES", "Piece", "batches_of", "pieces_of"]

BATCH_BYTES: Final = 128 * MiB
"""Largest size of a batch, of which two are held. A larger tensor is loaded in boxes; the checksum of a stored shard is
compared only if all of the shard fits into one batch."""


class Piece(NamedTuple):
    """Box of a tensor that is contiguous in the file.

    Attributes:
        name: Name of the tensor.
        offsets: Index of the first element of the box in the tensor.
        sizes: Shape of the box.
        start: First byte, counted from the start of the tensor.
        nbytes: Number of bytes.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    nbytes: int


def pieces_of(name: str, shape: Sequence[int], itemsize: int, *, max_bytes: int, rows: int = 1) -> Iterator[Piece]:
    """Cut a tensor into pieces, in the order of their bytes.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        itemsize: Bytes of an element.
        max_bytes: Largest number of bytes of a piece; at least ``itemsize``.
        rows: Rows that should stay together: the first dimension is cut at multiples of this number, if so many rows
            fit into a piece.
    """
    if math.prod(shape) * itemsize <= max_bytes:
        yield Piece(name, (0,) * len(shape), tuple(shape), 0, math.prod(shape) * itemsize)
        return
    # The first dimension in which a single index fits into a piece is cut; those before it are taken index by index.
    dim = next(dim for dim in range(len(shape)) if math.prod(shape[dim + 1 :]) * itemsize <= max_bytes)
    inner = math.prod(shape[dim + 1 :]) * itemsize
    step = max_bytes // inner
    if not dim and step >= rows:
        step -= step % rows
    start = 0
    for outer in itertools.product(*map(range, shape[:dim])):
        for first in range(0, shape[dim], step):
            count = min(step, shape[dim] - first)
            offsets = (*outer, first, *(0,) * (len(shape) - dim - 1))
            yield Piece(name, offsets, (*(1,) * dim, count, *shape[dim + 1 :]), start, count * inner)
            start += count * inner


def batches_of(pieces: Iterable[Piece], *, max_bytes: int) -> Iterator[list[Piece]]:
    """Yield batches of pieces, in their order; a batch has at most ``max_bytes`` bytes, or is a single piece."""
    batch: list[Piece] = []
    nbytes = 0
    for piece in pieces:
        if batch and nbytes + piece.nbytes > max_bytes:
            yield batch
            batch, nbytes = [], 0
        batch.append(piece)
        nbytes += piece.nbytes
    if batch:
        yield batch
