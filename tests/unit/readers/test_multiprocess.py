from __future__ import annotations

import os
import random
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpreader.errors import PlanError
from mpreader.ranges import ItemRange, Part
from mpreader.readers.multiprocess import MultiprocessS3Reader

DATA = os.urandom(10_000)
PART = 1000


class Reads:
    """Reads of a plan: all of DATA in parts of 1000 bytes, each in memory of its own."""

    def __init__(self, max_bytes: int) -> None:
        self.parts_by_file = {"s3://bucket/key": (7, [Part(at, at + PART) for at in range(0, len(DATA), PART)])}
        self.max_bytes = max_bytes
        self.taken: list[int] = []
        self.discarded: list[int] = []
        self.held_at_take: list[list[int]] = []
        self._lent: dict[int, weakref.ref[Any]] = {}

    def open_file(self) -> None: ...

    def close_file(self, uri: str, *, has_failed: bool) -> None: ...

    def take(self, slot_read: int) -> memoryview:
        index = slot_read - 7
        self.held_at_take.append(self.held())
        memory: Any = np.frombuffer(bytearray(DATA[index * PART : (index + 1) * PART]), np.uint8)
        self._lent[index] = weakref.ref(memory)
        self.taken.append(index)
        return memoryview(memory)

    def discard(self, start: int, stop: int) -> None:
        self.discarded += range(start - 7, stop - 7)

    def held(self) -> list[int]:
        return [index for index, memory in self._lent.items() if memory() is not None]


Opened = tuple[MultiprocessS3Reader, Reads]


@pytest.fixture
def opened() -> Callable[..., Opened]:
    def opened(*ranges: tuple[int, int], max_bytes: int = 1 << 20) -> Opened:
        reads = Reads(max_bytes)
        nothing: Any = None
        items = [ItemRange(start, end) for start, end in ranges]
        return MultiprocessS3Reader("bucket", "key", items, nothing, nothing, read_ahead=reads), reads

    return opened


@pytest.mark.parametrize(("end", "max_bytes"), [(6500, 1 << 20), (2500, 2500 * 8 - 1)])
def test_large_item_holds_no_part_while_it_waits_for_the_next(
    opened: Callable[..., Opened], end: int, max_bytes: int
) -> None:
    """Large is an item of more than four parts, or of more than an eighth of the arena."""
    reader, reads = opened((0, end), max_bytes=max_bytes)
    received = bytearray()
    list(map(received.extend, reader.item(0, end).pieces(0, end)))
    assert received == DATA[:end]
    assert reads.held_at_take == [[]] * len(reads.taken)
    assert reads.held() == [end // PART]  # the next item begins there


def test_small_item_is_held_until_reading_has_gone_on(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 2500), (2500, 4000))
    item = reader.item(0, 2500)
    for _ in range(2):
        assert b"".join(item.pieces(0, 2500)) == DATA[:2500]
    assert (reads.taken, reads.held()) == ([0, 1, 2], [0, 1, 2])
    assert reader.item(2500, 1500).view(0, 1500) == DATA[2500:4000]
    assert (reads.taken, reads.held()) == ([0, 1, 2, 3], [2, 3])


def test_items_that_overlap_are_held_together(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 2500), (1500, 4000), (4000, 5000))
    for start, end in ((1500, 4000), (0, 2500), (1500, 4000)):
        assert reader.item(start, end - start).view(0, end - start) == DATA[start:end]
    assert sorted(reads.taken) == [0, 1, 2, 3]
    reader.item(4000, 1000)
    assert reads.held() == []


def test_selected_item_gives_its_runs_and_refuses_the_rest(opened: Callable[..., Opened]) -> None:
    reader, _ = opened((100, 300), (2500, 4500), (7200, 7300), (9000, 9500))
    item = reader.selected_item(100, 8000, 0)
    assert item.view(0, 200) == DATA[100:300]
    assert [item.holds(0, 200), item.holds(0, 201), item.holds(2400, 4400), item.holds(-1, 5)] == [
        *(True, False, True, False)
    ]
    assert not item.holds(8900, 8950)  # within the ranges, but of the next item
    for start, end in ((200, 2500), (2300, 2500), (4000, 4500), (7999, 8001)):
        with pytest.raises(PlanError, match="were not selected"):
            item.pieces(start, end)
    assert b"".join(item.pieces(2400, 4400)) == DATA[2500:4500]
    with pytest.raises(ValueError, match="not within the ranges"):
        reader.selected_item(100, 8000, 300)


def test_selected_item_holds_no_part_of_a_run_that_was_read(opened: Callable[..., Opened]) -> None:
    """Of each run a little more is received than is needed, so that its last part is not read to the end."""
    reader, reads = opened((100, 300), *((at, at + 1500) for at in (1000, 3000, 5000)))
    item = reader.selected_item(100, 8000, 0)
    assert item.view(0, 200) == DATA[100:300]
    for run in (1000, 3000, 5000):
        assert b"".join(item.pieces(run - 100, run + 1300)) == DATA[run : run + 1400]
        assert reads.held() == [run // PART + 1]
    assert reads.taken == [0, 1, 2, 3, 4, 5, 6]


def test_refetched_item_is_taken_again(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((500, 1500))
    assert reader.item(500, 1000).view(0, 1000) == DATA[500:1500]
    assert reader.refetch(500, 1000).view(0, 1000) == DATA[500:1500]
    assert reads.taken == [0, 1, 0, 1]


def test_closed_reader_holds_nothing_and_views_stay_valid(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 2500))
    view: Any = reader.read(800)
    assert reader.read(1700) == DATA[800:2500]
    reader.close()
    assert (view, reads.held()) == (DATA[:800], [0])
    view = None
    assert reads.held() == []


def test_only_what_was_not_taken_is_discarded(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 2500), (2500, 6000), (6000, 10_000))
    reader.seek(2000)
    reader.read(500)
    reader.read(500)
    assert reads.discarded == [0, 1]
    reader.seek(6000)
    reader.read(1000)
    assert reads.discarded == [0, 1, 3, 4, 5]
    reader.seek(9000)
    reader.read(1000)
    reader.seek(7000)
    reader.read(2000)
    reader.close()
    assert reads.discarded == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("way", ["read", "readinto"])
def test_file_of_a_large_item_holds_no_part_that_one_read_passes(opened: Callable[..., Opened], way: str) -> None:
    """As torch.load reads it: the directory at the end, the head of a record, and all of the record at once."""
    reader, reads = opened((0, 6500))
    for start, size in ((0, 4), (6400, 100), (6450, 22), (30, 64)):
        reader.seek(start)
        assert reader.read(size) == DATA[start : start + size]
    reader.seek(94)
    target = bytearray(6300)
    if way == "readinto":
        assert reader.readinto(target) == 6300
    else:
        target[:] = reader.read(6300)
    assert target == DATA[94:6394]
    assert reads.taken == [0, 6, 1, 2, 3, 4, 5]
    assert reads.held_at_take[2:] == [[0, 6]] * 5
    reader.seek(6400)
    assert reader.read(100) == DATA[6400:6500]  # still there
    assert reads.taken[7:] == []
    reader.seek(2500)
    assert reader.read(10) == DATA[2500:2510]  # received again
    assert reads.taken[7:] == [2]


def test_file_of_a_small_item_is_received_once(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 3500))
    for _ in range(2):
        reader.seek(0)
        assert reader.read(3500) == DATA[:3500]
    assert reads.taken == [0, 1, 2, 3]


def test_reads_anywhere_in_an_item_are_its_bytes(opened: Callable[..., Opened]) -> None:
    reader, _ = opened((300, 2700), (2700, 2900), (2900, 9999))
    rng = random.Random(14)
    for low, high in ((300, 2700), (2700, 2900), (2900, 9999)):
        for _ in range(300):
            start = rng.randrange(low, high)
            target = bytearray(rng.choice([0, 1, 30, rng.randrange(high - start)]) % (high - start))
            assert reader.seek(start) == start
            assert reader.readinto(target) == len(target)
            assert target == DATA[start : start + len(target)]
            assert reader.tell() == start + len(target)


def test_short_reads_near_each_other_are_refused_like_any(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 1400), (1400, 1600), (2000, 3000))
    target = bytearray(10)
    reader.seek(1380)
    reader.readinto(target)
    reader.seek(1395)
    reader.readinto(target)  # goes on to the next item
    reader.seek(1595)
    with pytest.raises(ValueError, match="not within the ranges of the load plan"):
        reader.readinto(target)
    assert reader.tell() == 1595
    reader.seek(2500)
    reader.readinto(target)
    assert reads.held() == [2]
    reader.seek(1390)
    with pytest.raises(ValueError, match="given back already"):
        reader.readinto(target)
    reader.seek(2510)
    reader.close()
    calls: list[Callable[[], object]] = [
        lambda: reader.readinto(target),
        lambda: reader.readinto(bytearray()),
        lambda: reader.seek(0),
        reader.tell,
    ]
    for call in calls:
        with pytest.raises(ValueError, match="closed"):
            call()


def test_large_copy_lets_other_threads_run(opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool's thread must not wait for a copy. Threads switch by themselves after an hour here."""
    monkeypatch.setattr("mpreader.readers.multiprocess._LARGE_COPY_BYTES", 1000)
    target = bytearray(1000)
    ran: list[bool] = []
    waiting = threading.Lock()
    waiting.acquire()
    reader, _ = opened((0, 1000))
    reader.read(1)

    def run() -> None:
        with waiting:
            ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(3600)
    try:
        waiting.release()
        for _ in range(1_000_000):
            reader.seek(0)
            reader.readinto(target)
            if ran:
                break
        else:
            pytest.fail("no copy has let the other thread run")
    finally:
        sys.setswitchinterval(interval)
        thread.join()
