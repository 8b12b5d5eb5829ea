"""Pieces and batches of tensors, compared with the tensors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from mpreader.safetensors.conversion.pieces import batches_of, pieces_of


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 40), st.integers(1, 80), st.integers(1, 3))
def test_pieces_have_all_elements_in_order_and_are_bounded(
    shape: list[int], most: int, most_of_batch: int, rows: int
) -> None:
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    pieces = list(pieces_of("name", shape, 2, max_bytes=2 * most, rows=rows))
    found: list[int] = []
    for piece in pieces:
        box = tensor[tuple(slice(at, at + size) for at, size in zip(piece.offsets, piece.sizes, strict=True))]
        assert (tuple(box.shape), box.nbytes) == (piece.sizes, piece.nbytes)
        assert piece.start == 2 * len(found)
        assert piece.nbytes <= 2 * most
        if len(pieces) > 1 and most >= rows * math.prod(shape[1:]):
            assert piece.offsets[0] % rows == 0
        found += box.reshape(-1).tolist()
    assert found == list(range(tensor.numel()))
    batches = list(batches_of(pieces, max_bytes=most_of_batch))
    assert [piece for batch in batches for piece in batch] == pieces
    assert all(len(batch) == 1 or sum(piece.nbytes for piece in batch) <= most_of_batch for batch in batches)
