"""Pieces of tensors: boxes of bounded size whose bytes follow each other, and batches of them.

The converters move tensors piece by piece, so that their memory does not grow with a tensor. This module computes
only; it must work without torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["Piece", "batches_of", "pieces_of"]


class Piece(NamedTuple):
    """Box of a tensor whose bytes follow each other in a file.

    Attributes:
        name: Name of the tensor.
        offsets: First element, by dimension.
        sizes: Shape of the box.
        start: First byte, counted from the beginning of the tensor.
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
        max_bytes: Most bytes of a piece, at least those of one element.
        rows: The first dimension is cut at multiples of this, if so much of it fits into a piece.
    """
    if math.prod(shape) * itemsize <= max_bytes:
        yield Piece(name, (0,) * len(shape), tuple(shape), 0, math.prod(shape) * itemsize)
        return
    # The dimension that is cut: what lies within one step of it fits.
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
    """Group pieces, in their order; a batch has at most ``max_bytes``, or a single piece."""
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
