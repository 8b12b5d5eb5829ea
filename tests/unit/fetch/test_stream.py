"""The order of pieces: every range comes once, in the order that was asked for, whatever arrives first."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mpreader.fetch.arguments import StreamOrder
from mpreader.fetch.plan import Batch, FetchPlan, plan_batches
from mpreader.fetch.stream import PieceSequence
from mpreader.ranges import ItemRange

OBJECTS = [random.Random(number).randbytes(120) for number in range(3)]

spans = st.tuples(st.integers(0, 90), st.integers(0, 30)).map(lambda span: ItemRange(span[0], span[0] + span[1]))
wanted_of_sources = st.lists(st.lists(spans, max_size=6), max_size=3)


def plan_of(ranges: list[list[ItemRange]], order: StreamOrder) -> FetchPlan:
    batches: list[Batch] = []
    for source_index, of_source in enumerate(ranges):
        batches += plan_batches(source_index, of_source, order=order, max_gap_bytes=5, part_bytes=20, slot_bytes=40)
    return FetchPlan([f"object {index}" for index in range(len(ranges))], [], ranges, batches, [])


def drive(plan: FetchPlan, order: StreamOrder, chance: random.Random) -> list[tuple[int, int, bytes]]:
    """Take all slots, any of those that may be taken first."""
    sequence = PieceSequence(plan, order)
    pieces = [*sequence.first()]
    while sequence.wanted:
        taken = chance.choice([*sequence.wanted])
        batch = plan.batches[taken]
        slot = bytearray(batch.slot_read.nbytes)
        for part in batch.slot_read.parts:
            content = OBJECTS[batch.source_index][part.start : part.end]
            slot[part.slot_offset : part.slot_offset + len(content)] = content
        pieces += sequence.pieces_of(taken, memoryview(slot))
    pieces += sequence.last()
    return [(source_index, index, bytes(view)) for source_index, index, view in pieces]


def everything(ranges: list[list[ItemRange]]) -> list[tuple[int, int, bytes]]:
    return [
        (source_index, index, OBJECTS[source_index][each.start : each.end])
        for source_index, of_source in enumerate(ranges)
        for index, each in enumerate(of_source)
    ]


@given(wanted_of_sources, st.randoms(use_true_random=False))
def test_pieces_in_input_order_come_as_the_ranges_were_given(
    ranges: list[list[ItemRange]], chance: random.Random
) -> None:
    assert drive(plan_of(ranges, "input"), "input", chance) == everything(ranges)


@given(wanted_of_sources, st.randoms(use_true_random=False))
def test_pieces_in_offset_order_come_by_offset_and_empty_ones_first(
    ranges: list[list[ItemRange]], chance: random.Random
) -> None:
    got = drive(plan_of(ranges, "offset"), "offset", chance)
    assert sorted(got) == everything(ranges)
    places = [(bool(content), source, ranges[source][index].start * bool(content)) for source, index, content in got]
    assert places == sorted(places)


@given(wanted_of_sources, st.randoms(use_true_random=False))
def test_pieces_in_completion_order_come_once_whatever_arrives_first(
    ranges: list[list[ItemRange]], chance: random.Random
) -> None:
    assert sorted(drive(plan_of(ranges, "completion"), "completion", chance)) == everything(ranges)
