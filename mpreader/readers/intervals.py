"""Sorted disjoint intervals of bytes, of which the one that holds a position is found by bisection. Pure arithmetic.

The reader of a file whose parts were read ahead keeps three of them: its parts, the bytes that the load plan covers,
and the clusters of overlapping items.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

__all__ = ["Interval", "Intervals"]


class Interval(Protocol):
    """Bytes of an object, such as an ``ItemRange`` or a ``Part``."""

    @property
    def start(self) -> int:
        """First byte."""

    @property
    def end(self) -> int:
        """One past the last byte."""


T = TypeVar("T", bound=Interval)


class Intervals(Generic[T]):
    """Intervals that can be asked which of them holds a position.

    Args:
        intervals: Sorted by start, none of them empty, no two of them with a byte in common.
    """

    __slots__ = ("_intervals", "_starts")

    def __init__(self, intervals: Sequence[T]) -> None:
        self._intervals = intervals
        self._starts = [interval.start for interval in intervals]

    def __len__(self) -> int:
        return len(self._intervals)

    def __getitem__(self, index: int) -> T:
        return self._intervals[index]

    def index_at(self, position: int) -> int:
        """Returns the index of the last interval that starts at ``position`` or before; -1 if none does.

        No other interval can hold the position; this one does, unless the position is in the gap behind it.
        """
        return bisect_right(self._starts, position) - 1

    def hold(self, start: int, end: int) -> bool:
        """Returns True if one interval holds all bytes [start, end); there must be at least one byte."""
        index = self.index_at(start)
        return index >= 0 and end <= self._intervals[index].end
