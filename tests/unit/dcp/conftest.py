from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest


class CutItem:
    """A record cut into separately allocated pieces; refuses, loudly, to be read outside of its bounds."""

    def __init__(self, record: bytes, cuts: Sequence[int] = ()) -> None:
        borders = sorted({0, len(record), *(cut % (len(record) + 1) for cut in cuts)})
        self._parts = [(a, bytearray(record[a:b])) for a, b in pairwise(borders)]
        self.size = len(record)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        assert 0 <= start <= end <= self.size, (start, end, self.size)
        for at, part in self._parts:
            low, high = max(start, at), min(end, at + len(part))
            if low < high:
                yield memoryview(part)[low - at : high - at]

    def view(self, start: int, end: int) -> memoryview:
        return memoryview(bytearray(b"".join(self.pieces(start, end))))


@pytest.fixture(scope="session")
def cut_item() -> type[CutItem]:
    return CutItem
