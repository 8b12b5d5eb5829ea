"""The fetch planner against a model that receives every byte of a plan."""

from __future__ import annotations

import itertools
import pickle
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.config import KiB, MiB
from mpreader.fetch.arguments import StreamOrder
from mpreader.fetch.plan import Batch, cut_into_pieces, plan_batches
from mpreader.pool.worker.messages import MAX_MESSAGE_BYTES
from mpreader.ranges import ItemRange, clusters

OBJECT = random.Random(0).randbytes(400 * KiB)
PART, SLOT = 50, 120
LEAST_SKIP = 16 * KiB

spans = st.tuples(st.integers(0, 300), st.integers(0, 100)).map(lambda span: ItemRange(span[0], span[0] + span[1]))
layouts = st.lists(spans, max_size=12)
gaps = st.one_of(st.integers(0, 60), st.just(float("inf")))
orders = st.sampled_from(get_args(StreamOrder))
# The same a thousand times as large: only there gaps are large enough to be skipped.
far_spans = st.tuples(st.integers(0, 300 * KiB), st.integers(0, 20 * KiB)).map(lambda s: ItemRange(s[0], s[0] + s[1]))
far_layouts = st.lists(far_spans, max_size=12)
far_gaps = st.one_of(st.integers(0, 60 * KiB), st.just(float("inf")))


def plan(ranges: list[ItemRange], order: StreamOrder, gap: float, unit: int = 1) -> list[Batch]:
    sizes = {"part_bytes": PART * unit, "slot_bytes": SLOT * unit}
    return list(plan_batches(7, ranges, order=order, max_gap_bytes=gap, **sizes))


def received(batch: Batch) -> bytearray:
    """The slot of a batch, when all its parts have come."""
    slot = bytearray(batch.slot_read.nbytes)
    for part in batch.slot_read.parts:
        kept = [OBJECT[start:end] for start, end in between(part.start, part.end, part.skips)]
        slot[part.slot_offset : part.slot_offset + part.kept_bytes] = b"".join(kept)
    assert len(slot) == batch.slot_read.nbytes
    return slot


def between(start: int, end: int, skips: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The stretches from ``start`` to ``end`` that are not skipped."""
    borders = [start, *itertools.chain(*skips), end]
    assert borders == sorted(borders)
    return list(zip(borders[::2], borders[1::2], strict=True))


@given(st.one_of(st.tuples(layouts, gaps, st.just(1)), st.tuples(far_layouts, far_gaps, st.just(KiB))), orders)
def test_plan_brings_the_bytes_of_every_range_to_one_place(
    given_: tuple[list[ItemRange], float, int], order: StreamOrder
) -> None:
    ranges, gap, unit = given_
    got: list[tuple[int, bytes]] = []
    for batch in plan(ranges, order, gap, unit):
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


@given(far_layouts, orders, far_gaps)
def test_plan_has_no_memory_for_large_gaps(ranges: list[ItemRange], order: StreamOrder, gap: float) -> None:
    for batch in plan(ranges, order, gap, KiB):
        members = [ranges[member.position] for member in batch.members]
        wanted = sum(cluster.size for cluster in clusters(members))
        assert batch.slot_read.nbytes <= wanted + len(members) * (LEAST_SKIP + 2 * 64)
        for part in batch.slot_read.parts:
            assert all(end - start > LEAST_SKIP - 64 for start, end in part.skips)


@given(far_layouts, far_gaps)
def test_ranges_lie_in_the_slot_as_they_would_with_all_gaps(ranges: list[ItemRange], gap: float) -> None:
    # Arrays of any type can be made on ranges that begin at a multiple of 64, whatever is skipped before them.
    aligned = [ItemRange(each.start // 64 * 64, each.end) for each in ranges]
    for batch in plan(aligned, "offset", gap, KiB):
        assert all(member.slot_offset % 64 == 0 for member in batch.members)


@pytest.mark.parametrize("part_bytes", [8 * MiB, 1024 * MiB])
def test_request_with_the_most_skips_fits_into_a_message(part_bytes: int) -> None:
    for step in (1 << exponent for exponent in range(14, 24)):
        far = 1 << 45  # numbers of many digits, as in the largest objects
        ranges = [ItemRange(start, start + 1) for start in range(far, far + 8000 * (step + 1), step + 1)]
        sizes = {"part_bytes": part_bytes, "slot_bytes": part_bytes}
        batches = list(plan_batches(0, ranges, order="offset", max_gap_bytes=float("inf"), **sizes))
        skips = [part.skips for batch in batches for part in batch.slot_read.parts]
        assert max(len(pickle.dumps(each)) for each in skips) < MAX_MESSAGE_BYTES // 3
