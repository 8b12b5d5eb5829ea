"""The arena against a model."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader import ArenaClosed
from mpreader.config import KiB, MiB
from mpreader.pool.coordinator.arena import Arena, Slot

BLOCK = 256 * KiB
SEGMENT = 1 * MiB


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(max_bytes=4 * MiB, block_bytes=BLOCK, segment_bytes=SEGMENT)
    yield arena
    arena.close()


def taken(arena: Arena, nbytes: int, **options: bool) -> Slot:
    slot = arena.allocate(nbytes, **options)
    assert slot is not None
    return slot


def extent(slot: Slot) -> tuple[int, int, int]:
    return slot.segment.number, slot.offset, slot.offset + slot.nbytes


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.one_of(
            st.integers(1, BLOCK),
            st.integers(BLOCK + 1, 2 * MiB),
            st.integers(-40, -1),  # free the oldest, second oldest, …
        ),
        max_size=60,
    )
)
def test_arena_slots_never_overlap_and_all_come_back(steps: list[int]) -> None:
    arena = Arena(max_bytes=4 * MiB, block_bytes=BLOCK, segment_bytes=SEGMENT)
    held: list[Slot] = []
    try:
        for step in steps:
            if step < 0:
                if held:
                    arena.free(held.pop(-step % len(held)))
                continue
            slot = arena.allocate(step)
            if slot is None:
                assert held, "everything is free, yet there is no room"
                continue
            number, start, end = extent(slot)
            assert 0 <= start < end <= slot.segment.size
            assert slot.nbytes >= step
            for other in held:
                other_number, other_start, other_end = extent(other)
                assert number != other_number or end <= other_start or start >= other_end
            held.append(slot)
            assert arena.reserved_bytes <= arena.max_bytes
            assert arena.reserved_bytes == sum(segment.size for segment in arena.segments.values())
        for slot in held:
            arena.free(slot)
        # Everything is merged again: the whole limit can be had in the largest blocks.
        assert all(arena.allocate(BLOCK) is not None for _ in range(arena.max_bytes // BLOCK))
        assert arena.allocate(1) is None
    finally:
        arena.close()


def test_arena_small_slots_merge_into_a_block_again(arena: Arena) -> None:
    slots = [taken(arena, 1) for _ in range(arena.max_bytes // (64 * KiB))]
    assert arena.allocate(1) is None
    random.Random(5).shuffle(slots)
    for slot in slots:
        arena.free(slot)
    assert all(arena.allocate(BLOCK) is not None for _ in range(arena.max_bytes // BLOCK))


def test_arena_gives_the_warmest_slot_first(arena: Arena) -> None:
    slots = [taken(arena, BLOCK) for _ in range(4)]
    arena.free(slots[2])
    assert extent(taken(arena, BLOCK)) == extent(slots[2])


def test_arena_large_slot_takes_the_room_of_free_segments(arena: Arena) -> None:
    slots = [taken(arena, BLOCK) for _ in range(arena.max_bytes // BLOCK)]
    arena.take_changes()
    assert arena.allocate(3 * MiB) is None
    kept = slots.pop(0)
    for slot in slots:
        arena.free(slot)
    large = taken(arena, 3 * MiB)
    assert arena.reserved_bytes <= arena.max_bytes
    made, dropped = arena.take_changes()
    assert ([segment.number for segment in made], len(dropped)) == ([large.segment.number], 3)
    assert kept.segment.number in arena.segments


def test_arena_segment_that_nobody_has_heard_of_is_never_announced(arena: Arena) -> None:
    arena.free(taken(arena, 2 * MiB))
    assert arena.take_changes() == ([], []), "its descriptor is closed: nobody could map it"


def test_arena_beyond_the_limit_is_given_back(arena: Arena) -> None:
    slots = [taken(arena, BLOCK, beyond_limit=True) for _ in range(2 * arena.max_bytes // BLOCK)]
    assert arena.reserved_bytes == 2 * arena.max_bytes
    for slot in slots:
        arena.free(slot)
    assert arena.reserved_bytes == arena.max_bytes

    large = taken(arena, 6 * MiB, beyond_limit=True)
    assert arena.reserved_bytes == 6 * MiB, "free segments should have made room for it"
    arena.free(large)
    assert arena.reserved_bytes == 0


def test_arena_of_many_gigabytes_needs_few_descriptors() -> None:
    arena = Arena(max_bytes=1 << 34, block_bytes=BLOCK, segment_bytes=SEGMENT)
    try:
        for _ in range(1 * MiB * 512 // BLOCK):
            taken(arena, BLOCK)
        assert len(arena.segments) < 80
    finally:
        arena.close()


def test_arena_leaves_no_name_in_dev_shm(arena: Arena, new_shared_memory: Callable[[], set[str]]) -> None:
    slot = taken(arena, BLOCK)
    assert not new_shared_memory()
    assert os.fstat(slot.segment.fd).st_nlink == 0
    assert os.fstat(slot.segment.fd).st_blocks * 512 >= slot.segment.size, "not reserved in full"


@pytest.mark.parametrize("nbytes", [1, BLOCK + 1])
def test_arena_that_was_closed_allocates_nothing(arena: Arena, nbytes: int) -> None:
    taken(arena, nbytes)
    arena.close()
    arena.close()
    with pytest.raises(ArenaClosed):
        arena.allocate(nbytes)
    assert (arena.reserved_bytes, arena.segments) == (0, {})
