"""The arena against a model, and what a lease promises."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader import ArenaClosed
from mpreader.config import KiB, MiB
from mpreader.pool.coordinator.arena import Arena, Lease, Slot

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


@settings(max_examples=60, deadline=None)
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
    assert arena.allocate(3 * MiB) is None
    kept = slots.pop(0)
    for slot in slots:
        arena.free(slot)
    large = taken(arena, 3 * MiB)
    assert arena.reserved_bytes <= arena.max_bytes
    assert large.segment.number != kept.segment.number
    made, dropped = arena.take_changes()
    assert [segment.number for segment in made][-1] == large.segment.number
    assert len(dropped) == 3


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


def test_arena_leaves_no_name_in_dev_shm(arena: Arena) -> None:
    before = set(os.listdir("/dev/shm"))
    slot = taken(arena, BLOCK)
    assert set(os.listdir("/dev/shm")) <= before
    assert os.fstat(slot.segment.fd).st_nlink == 0
    assert os.fstat(slot.segment.fd).st_blocks * 512 >= slot.segment.size, "not reserved in full"


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda view: view, id="view"),
        pytest.param(lambda view: view[10:20][2:4], id="slice of a slice"),
        pytest.param(lambda view: np.frombuffer(view, np.uint8), id="numpy array"),
        pytest.param(lambda view: np.frombuffer(view[64:], np.int64)[1:3].reshape(2, 1), id="numpy view of a view"),
        pytest.param(lambda view: torch.frombuffer(view, dtype=torch.uint8), id="torch tensor"),
        pytest.param(lambda view: torch.frombuffer(view[:512], dtype=torch.float32)[1:2].view(1, 1), id="torch view"),
        pytest.param(lambda view: view.cast("i")[1:2].toreadonly(), id="cast, read-only"),
    ],
)
def test_lease_ends_only_with_the_last_thing_made_from_it(arena: Arena, use: object) -> None:
    ended: list[Lease] = []
    slot = taken(arena, 64 * KiB)
    view = slot.lease(ended.append)
    last = use(view)  # type: ignore[operator]
    del view
    gc.collect()
    assert not ended
    del last
    assert [lease.slot() for lease in ended] == [slot]


@pytest.mark.row("views held while the load goes on; close with live views")
def test_lease_view_outlives_slot_and_arena(arena: Arena) -> None:
    slot = taken(arena, 64 * KiB)
    view = slot.lease(lambda _: None)
    view[:5] = b"stays"
    arena.free(slot)
    del slot
    arena.close()
    gc.collect()
    assert bytes(view[:5]) == b"stays"


def test_lease_can_be_made_again_for_the_next_user(arena: Arena) -> None:
    ended: list[Lease] = []
    slot = taken(arena, 64 * KiB)
    for _ in range(2):
        view = slot.lease(ended.append)
        del view
    assert [lease.slot() for lease in ended] == [slot, slot]


def test_lease_that_has_ended_keeps_no_memory(arena: Arena) -> None:
    ended: list[Lease] = []
    slot = taken(arena, 64 * KiB)
    view = slot.lease(ended.append)
    del view
    assert [lease.slot() for lease in ended] == [slot]
    del slot
    assert [lease.slot() for lease in ended] == [None]


@pytest.mark.row("Ctrl-C")
def test_ctrl_c_is_not_lost_at_the_end_of_a_lease(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: lost.append(unraisable.exc_value))
    ended: deque[Lease] = deque(maxlen=1)
    slot = taken(arena, 64 * KiB)
    caught = 0
    gc.disable()  # who runs Python code at its beginning and end loses a Ctrl-C there
    before = signal.signal(signal.SIGPROF, signal.default_int_handler)  # Ctrl-C's handler, for a timer's signal
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_PROF, 0.0015)
                for _ in range(100_000):  # a tenth of a second
                    slot.lease(ended.append)
            except KeyboardInterrupt:  # noqa: PERF203  # that is what is counted
                caught += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        gc.enable()
    assert not lost
    assert caught > 190


# -- a /dev/shm that is too small


def in_small_shm(size: str, program: str) -> str:
    """Run a program where ``/dev/shm`` is a private one of ``size``."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount (root) for a /dev/shm of its own")
    shell = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" -c "$1"'
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, sys.executable, textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("nbytes", [1, BLOCK + 1])
def test_arena_that_was_closed_allocates_nothing(arena: Arena, nbytes: int) -> None:
    taken(arena, nbytes)
    arena.close()
    arena.close()
    with pytest.raises(ArenaClosed):
        arena.allocate(nbytes)
    assert (arena.reserved_bytes, arena.segments) == (0, {})


@pytest.mark.row("small or full /dev/shm")
def test_arena_on_a_full_dev_shm_says_what_to_do() -> None:
    out = in_small_shm(
        "2m",
        """
        from mpreader.errors import ArenaError
        from mpreader.pool.coordinator.arena import Arena
        try:
            Arena(64 << 20, 1 << 20, 32 << 20).allocate(1000)
        except ArenaError as error:
            print(error)
        """,
    )
    assert "No space left" in out
    assert "2097152 bytes free" in out
    assert "--shm-size" in out
    assert "MPREADER_MAX_MEMORY" in out


@pytest.mark.row("small or full /dev/shm")
def test_arena_that_meets_a_full_dev_shm_goes_on_smaller_with_a_warning() -> None:
    out = in_small_shm(
        "5m",
        """
        import logging
        logging.basicConfig()
        from mpreader.pool.coordinator.arena import Arena
        arena = Arena(64 << 20, 1 << 20, 2 << 20)
        slots = []
        while (slot := arena.allocate(1 << 20)) is not None:
            slot.lease(lambda _: None)[:] = b"x" * (1 << 20)
            slots.append(slot)
        print(len(slots), arena.max_bytes)
        arena.free(slots.pop())
        assert arena.allocate(1 << 20) is not None
        """,
    )
    assert f"4 {4 * MiB}" in out
    assert "WARNING:mpreader.pool.coordinator.arena:shared memory is short" in out


@pytest.mark.row("small or full /dev/shm")
def test_pool_fits_itself_to_a_small_dev_shm() -> None:
    out = in_small_shm(
        "4m",
        """
        import os
        from mpreader import RangeFetcher
        from mpreader.testing import FaultServer
        data = os.urandom(3_000_000)
        with FaultServer({"/o": data}) as server, RangeFetcher() as fetcher:
            ranges = [(start, start + 100_000) for start in range(0, 3_000_000, 100_000)]
            for index, view in fetcher.stream(server.url("/o"), ranges):
                assert view == data[index * 100_000 :][:100_000]
            print("all", fetcher._engine.pool.sizes.max_bytes)
        """,
    )
    assert "all" in out
