"""The fetch planner against a model that receives every byte of a plan."""

from __future__ import annotations

import itertools
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.fetch.arguments import StreamOrder
from mpreader.fetch.plan import Batch, cut_into_pieces, plan_batches
from mpreader.ranges import ItemRange, clusters

OBJECT = random.Random(0).randbytes(400)
PART, SLOT = 50, 120

spans = st.tuples(st.integers(0, 300), st.integers(0, 100)).map(lambda span: ItemRange(span[0], span[0] + span[1]))
layouts = st.lists(spans, max_size=12)
gaps = st.one_of(st.integers(0, 60), st.just(float("inf")))
orders = st.sampled_from(get_args(StreamOrder))


def plan(ranges: list[ItemRange], order: StreamOrder, gap: float) -> list[Batch]:
    sizes = {"part_bytes": PART, "slot_bytes": SLOT}
    return list(plan_batches(7, ranges, order=order, max_gap_bytes=gap, **sizes))


def received(batch: Batch) -> bytearray:
    """The slot of a batch, when all its parts have come."""
    slot = bytearray(batch.slot_read.nbytes)
    for part in batch.slot_read.parts:
        slot[part.slot_offset : part.slot_offset + part.end - part.start] = OBJECT[part.start : part.end]
    return slot


@given(layouts, orders, gaps)
def test_plan_brings_the_bytes_of_every_range_to_one_place(
    ranges: list[ItemRange], order: StreamOrder, gap: float
) -> None:
    got: list[tuple[int, bytes]] = []
    for batch in plan(ranges, order, gap):
        assert batch.source_index == 7
        slot = received(batch)
        got += ((position, bytes(slot[at : at + nbytes])) for position, at, nbytes in batch.members)
    expected = [(index, OBJECT[item.start : item.end]) for index, item in enumerate(ranges) if item.size]
    assert sorted(got) == expected
    positions = [position for position, _ in got]
    if order == "input":
        assert positions == [index for index, _ in expected]
    else:
        assert positions == sorted(positions, key=lambda position: ranges[position].start)


@given(layouts, orders, gaps)
def test_plan_keeps_to_the_sizes_of_parts_and_slots(ranges: list[ItemRange], order: StreamOrder, gap: float) -> None:
    for batch in plan(ranges, order, gap):
        nbytes, parts = batch.slot_read.nbytes, batch.slot_read.parts
        assert all(0 < part.end - part.start <= PART for part in parts)
        places = sorted((part.slot_offset, part.slot_offset + part.end - part.start) for part in parts)
        assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))
        # A slot is too large only for a range that is too large, or for ranges that overlap.
        members = [ranges[member.position] for member in batch.members]
        assert nbytes <= SLOT or len(members) == 1 or len(clusters(members)) < len(members)


@given(layouts, orders, gaps)
def test_plan_counts_the_bytes_that_nobody_asked_for(ranges: list[ItemRange], order: StreamOrder, gap: float) -> None:
    wanted = {byte for item in ranges for byte in range(item.start, item.end)}
    for batch in plan(ranges, order, gap):
        fetched = [byte for part in batch.slot_read.parts for byte in range(part.start, part.end)]
        if order != "input":  # there a gap may be between two ranges and within a third
            assert batch.slot_read.over_read == sum(byte not in wanted for byte in fetched)
        assert batch.slot_read.over_read <= len(fetched)


@given(layouts, orders)
def test_groups_begin_where_arrays_of_any_type_can(ranges: list[ItemRange], order: StreamOrder) -> None:
    for batch in plan(ranges, order, 0):
        ends = {part.slot_offset + part.end - part.start for part in batch.slot_read.parts}
        begins = [part.slot_offset for part in batch.slot_read.parts if part.slot_offset not in ends]
        assert all(offset % 64 == 0 for offset in begins)


@given(layouts, st.integers(1, 60))
def test_pieces_put_together_are_the_ranges(ranges: list[ItemRange], piece_bytes: int) -> None:
    pieces, origins = cut_into_pieces(ranges, piece_bytes)
    assert all(0 < piece.size <= piece_bytes for piece in pieces)
    buffers = [bytearray(item.size) for item in ranges]
    for piece, (index, offset) in zip(pieces, origins, strict=True):
        buffers[index][offset : offset + piece.size] = OBJECT[piece.start : piece.end]
    assert buffers == [OBJECT[item.start : item.end] for item in ranges]


@pytest.mark.parametrize("order", ["offset", "completion"])
def test_small_ranges_side_by_side_get_many_slots(order: StreamOrder) -> None:
    # They are one group; in one slot they would be given back together.
    ranges = [ItemRange(start, start + 10) for start in range(0, 400, 10)]
    assert [batch.slot_read.nbytes for batch in plan(ranges, order, float("inf"))] == [120, 120, 120, 40]


def test_descending_ranges_in_input_order_are_not_joined() -> None:
    ranges = [ItemRange(20, 30), ItemRange(10, 20), ItemRange(0, 10)]
    assert sum(len(batch.slot_read.parts) for batch in plan(ranges, "input", float("inf"))) == 3
    assert sum(len(batch.slot_read.parts) for batch in plan(ranges[::-1], "input", float("inf"))) == 1
