"""How the ranges of a fetch are put into slots of shared memory: pure arithmetic.

A batch is one slot's worth of ranges of one object, which are received, handed out and given back together.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from mpreader.errors import ConfigError, PlanError
from mpreader.pool.source import Source
from mpreader.pool.transfer import Fill, FillPart
from mpreader.ranges import ItemRange, RangeGroup, coalesce, partition

__all__ = [
    "Batch",
    "RangeLike",
    "StreamOrder",
    "absolute",
    "check_order",
    "group_ranges",
    "is_relative",
    "pack",
    "to_item_ranges",
]

_ALIGNMENT: Final = 64  # of each group in its slot, so that arrays of any type can be made on it

RangeLike = ItemRange | tuple[int, int | None]
StreamOrder = Literal["offset", "input", "completion"]


class Batch(NamedTuple):
    """A fill, and where in its slot the ranges of order number ``order`` are: (index, slot offset, bytes)."""

    order: int
    fill: Fill
    members: tuple[tuple[int, int, int], ...]


def check_order(order: str) -> None:
    """Refuse what is no order of a stream.

    Raises:
        ConfigError: It is none.
    """
    if order not in ("offset", "input", "completion"):
        raise ConfigError(f'order is "offset", "input" or "completion", got {order!r}')


def group_ranges(ranges: Sequence[ItemRange], max_gap: float, order: StreamOrder) -> Iterator[RangeGroup]:
    """Group ranges that are fetched as one.

    In the order of the input, only neighbours in the input that ascend can be: memory would not stay bounded otherwise.
    """
    if order != "input":
        yield from coalesce(ranges, max_gap_bytes=max_gap)
        return
    for start, stop in _ascending(ranges):
        for group in coalesce(ranges[start:stop], max_gap_bytes=max_gap):
            indices = tuple(start + index for index in group.indices)
            yield RangeGroup(group.start, group.end, group.item_ranges, indices)


def _ascending(ranges: Sequence[ItemRange]) -> Iterator[tuple[int, int]]:
    """Cuts [start, stop) of the input, so that within each every range starts behind the one before, or with it."""
    start = 0
    for position in range(1, len(ranges) + 1):
        if position == len(ranges) or ranges[position].start < ranges[position - 1].start:
            yield start, position
            start = position


def pack(order: int, source: Source, groups: Iterable[RangeGroup], part_bytes: int, slot_bytes: int) -> Iterator[Batch]:
    """Put groups into slots: as many together as fit into ``slot_bytes``, a larger range into a slot of its own."""
    parts: list[FillPart] = []
    members: list[tuple[int, int, int]] = []
    nbytes = over_read = 0
    for group in itertools.chain.from_iterable(_cut_between_ranges(group, slot_bytes) for group in groups):
        size = group.end - group.start
        slot_offset = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if parts and slot_offset + size > slot_bytes:
            yield Batch(order, Fill(source, nbytes, tuple(parts), over_read), tuple(members))
            parts, members, slot_offset, over_read = [], [], 0, 0
        for part in partition(group, part_bytes=part_bytes):
            parts.append(FillPart(part.start, part.end, slot_offset + part.start - group.start))
            over_read += part.over_read
        for index, item_range in zip(group.indices, group.item_ranges, strict=True):
            members.append((index, slot_offset + item_range.start - group.start, item_range.size))
        nbytes = slot_offset + size
    if parts:
        yield Batch(order, Fill(source, nbytes, tuple(parts), over_read), tuple(members))


def _cut_between_ranges(group: RangeGroup, most_bytes: int) -> Iterator[RangeGroup]:
    # Or a thousand small ranges side by side would need one slot for all of them, and be given back together.
    first, end = 0, group.start
    for position, item_range in enumerate(group.item_ranges):
        start = group.item_ranges[first].start
        if position > first and item_range.start >= end and item_range.end - start > most_bytes:
            yield RangeGroup(start, end, group.item_ranges[first:position], group.indices[first:position])
            first = position
        end = max(end, item_range.end)
    yield RangeGroup(group.item_ranges[first].start, end, group.item_ranges[first:], group.indices[first:])


def is_relative(ranges: Iterable[RangeLike] | None) -> bool:
    """Whether the size of the object must be known before anything is planned."""
    return ranges is None or any(
        not isinstance(item, ItemRange) and isinstance(item, tuple) and (None in item or _is_negative(item))
        for item in ranges
    )


def _is_negative(item: tuple[object, ...]) -> bool:
    return any(isinstance(number, int) and number < 0 for number in item)


def absolute(ranges: Iterable[RangeLike] | None, size: int) -> list[RangeLike]:
    """The same ranges, as in a slice: None means the end, and negative numbers are counted from there."""
    if ranges is None:
        return [(0, size)]
    return [_absolute(item, size) for item in ranges]


def _absolute(item: RangeLike, size: int) -> RangeLike:
    if isinstance(item, ItemRange) or not isinstance(item, tuple) or len(item) != 2:
        return item  # to_item_ranges says what is wrong with it
    start, end = (0 if item[0] is None else item[0]), (size if item[1] is None else item[1])
    return (max(0, size + start) if _is_negative((start,)) else start), (size + end if _is_negative((end,)) else end)


def to_item_ranges(ranges: Iterable[RangeLike]) -> list[ItemRange]:
    """Check the ranges that a caller gave.

    Raises:
        PlanError: One is no pair of whole numbers with ``0 <= start <= end``.
    """
    item_ranges = []
    for item_range in ranges:
        if isinstance(item_range, ItemRange):
            item_ranges.append(item_range)
            continue
        try:
            start, end = map(_to_int, item_range)
        except (TypeError, ValueError):
            raise PlanError(
                f"a range is a pair (start, end) of whole numbers or an ItemRange, got {item_range!r}"
            ) from None
        item_ranges.append(ItemRange(start, end))
    return item_ranges


def _to_int(number: object) -> int:
    """A plain int of any whole number, numpy's included.

    Raises:
        TypeError: It is none; True and False are none either.
    """
    if isinstance(number, bool):
        raise TypeError(f"not a whole number: {number!r}")
    return operator.index(number)  # type: ignore[arg-type]  # raises for what has no index
