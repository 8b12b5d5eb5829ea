from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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
        self.given_back: list[int] = []
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
        self.given_back += range(start - 7, stop - 7)

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
    assert (reads.taken, reads.given_back) == ([0, 1, 2], [])
    assert reader.item(2500, 1500).view(0, 1500) == DATA[2500:4000]
    assert (reads.taken, reads.given_back, reads.held()) == ([0, 1, 2, 3], [0, 1], [2, 3])


def test_items_that_overlap_are_held_together(opened: Callable[..., Opened]) -> None:
    reader, reads = opened((0, 2500), (1500, 4000), (4000, 5000))
    for start, end in ((1500, 4000), (0, 2500), (1500, 4000)):
        assert reader.item(start, end - start).view(0, end - start) == DATA[start:end]
    assert sorted(reads.taken) == [0, 1, 2, 3]
    reader.item(4000, 1000)
    assert (reads.given_back, reads.held()) == ([0, 1, 2, 3], [])


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
    assert reads.given_back == list(range(10))
