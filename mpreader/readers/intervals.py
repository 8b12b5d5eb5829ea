"""Sorted disjoint intervals of bytes: finds the interval that holds a position, by bisection. Pure arithmetic.

It is used by :class:`~mpreader.readers.multiprocess.MultiprocessS3Reader` for its parts, for the bytes that the load
plan covers, and for the clusters of overlapping items.
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
    """Sequence of intervals in which the one at a position can be found.

    Args:
        intervals: The intervals, sorted by start; none is empty, and no two have a byte in common.
    """

    __slots__ = ("_intervals", "_starts")

    def __init__(self, intervals: Sequence[T]) -> None:
        self._intervals = intervals
        self._starts = [interval.start for interval in intervals]  # for bisect, once instead of at every look-up

    def __len__(self) -> int:
        return len(self._intervals)

    def __getitem__(self, index: int) -> T:
        return self._intervals[index]

    def index_at(self, position: int) -> int:
        """Returns the index of the last interval that starts at ``position`` or before; -1 if none does.

        If any interval holds the position, it is this one. It does not if the position is in the gap behind it.
        """
        return bisect_right(self._starts, position) - 1

    def hold(self, start: int, end: int) -> bool:
        """Returns True if one interval holds all bytes [start, end); there must be at least one byte."""
        index = self.index_at(start)
        return index >= 0 and end <= self._intervals[index].end
