"""Fetch planner: packs the ranges of a call into slots of shared memory, and cuts them into requests.

The engine calls it; the fetchers take what arrives by the plan that it makes. It is pure: it knows no pool and no
client, and makes no request.

Ranges that are near each other form a group, which is fetched as one. A *batch* is what one slot holds: groups of one
object, which are received, handed out and given back together::

    object    [0][1]  gap  [2]            [3]
    groups    [0 .. 2        ]            [3]
    slot      [0][1]  gap  [2] padding [3]

Sources are numbered in the order of the call; that number is the *source index*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from mpreader.fetch.arguments import StreamOrder
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import Source
from mpreader.ranges import ItemRange, Part, RangeGroup, coalesce, partition

__all__ = ["Batch", "FetchPlan", "Member", "PieceOrigin", "cut_into_pieces", "plan_batches"]

_ALIGNMENT_BYTES: Final = 64  # of each group in its slot, so that arrays of any type can be made on it


class Member(NamedTuple):
    """Place of one range in the slot of its batch.

    Attributes:
        position: Position of the range, or of the piece where ranges were cut, among those of its source.
        slot_offset: First byte of the range, counted from the start of the slot.
        nbytes: Bytes of the range.
    """

    position: int
    slot_offset: int
    nbytes: int


class Batch(NamedTuple):
    """Ranges that share a slot.

    Attributes:
        source_index: Number of their source.
        slot_read: Read of the pool that brings them.
        members: Places of the ranges in the slot, by offset in the object.
    """

    source_index: int
    slot_read: SlotRead
    members: tuple[Member, ...]


class PieceOrigin(NamedTuple):
    """Place of a piece in the range that it was cut from.

    Attributes:
        range_index: Position of the range among those of its source.
        range_offset: First byte of the piece, counted from the start of the range.
    """

    range_index: int
    range_offset: int


class FetchPlan(NamedTuple):
    """Everything that a call will read.

    Attributes:
        uris: Sources as the caller named them, by source index.
        sources: The sources, by source index.
        ranges: Ranges of each source, in the order of the input, by source index.
        batches: All batches, in the order in which they are read; each range that is not empty is in exactly one.
        origins: By source index. Where ranges were cut into pieces, the members of batches are pieces, and this says
            from where each of them comes; otherwise empty.
    """

    uris: list[str]
    sources: list[Source]
    ranges: list[list[ItemRange]]
    batches: list[Batch]
    origins: list[list[PieceOrigin]]

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots together, gaps and padding included."""
        return sum(batch.slot_read.nbytes for batch in self.batches)

    @property
    def largest_range_bytes(self) -> int:
        """Bytes of the largest range; 0 where there is none."""
        return max((item_range.size for ranges in self.ranges for item_range in ranges), default=0)


def plan_batches(
    source_index: int,
    ranges: Sequence[ItemRange],
    *,
    order: StreamOrder,
    max_gap_bytes: float,
    part_bytes: int,
    slot_bytes: int,
) -> Iterator[Batch]:
    """Plan the batches of one source.

    Args:
        source_index: Number of the source in its call.
        ranges: Ranges in the order of the input; may repeat, overlap, nest and be empty.
        order: Order in which ranges are handed out. ``"input"`` keeps that of the input, the others sort by offset.
        max_gap_bytes: Largest gap between two ranges that are fetched as one.
        part_bytes: Most bytes of one request.
        slot_bytes: Bytes of a slot: as many groups as fit share one. A range that is larger, or that others overlap,
            gets a larger slot of its own.

    Returns:
        The batches, in the order in which they are read.
    """
    slot = _Slot()
    for group in _groups(ranges, order, max_gap_bytes):
        for chunk in _cut_between_ranges(group, slot_bytes):
            if not slot.is_empty and slot.end_with(chunk) > slot_bytes:
                yield slot.to_batch(source_index)
                slot = _Slot()
            slot.add(chunk, part_bytes)
    if not slot.is_empty:
        yield slot.to_batch(source_index)


def cut_into_pieces(ranges: Sequence[ItemRange], piece_bytes: int) -> tuple[list[ItemRange], list[PieceOrigin]]:
    """Cut ranges into pieces of at most ``piece_bytes``, so that a range may be larger than memory.

    Returns:
        The pieces, and the origin of each.
    """
    pieces, origins = [], []
    for range_index, item_range in enumerate(ranges):
        for start in range(item_range.start, item_range.end, piece_bytes):
            pieces.append(ItemRange(start, min(start + piece_bytes, item_range.end)))
            origins.append(PieceOrigin(range_index, start - item_range.start))
    return pieces, origins


class _Slot:
    """A slot while it is packed: groups of one source, one behind the other."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._over_read = 0
        self._parts: list[Part] = []
        self._members: list[Member] = []

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def end_with(self, group: RangeGroup) -> int:
        """Bytes of the slot if the group were added."""
        return self._next_offset() + group.end - group.start

    def add(self, group: RangeGroup, part_bytes: int) -> None:
        slot_offset = self._next_offset()
        shift = slot_offset - group.start  # from an offset in the object to one in the slot
        for part in partition(group, part_bytes=part_bytes):
            self._parts.append(Part(part.start, part.end, part.over_read, part.start + shift))
            self._over_read += part.over_read
        self._members += [
            Member(position, item_range.start + shift, item_range.end - item_range.start)
            for position, item_range in zip(group.indices, group.item_ranges, strict=True)
        ]
        self._nbytes = slot_offset + group.end - group.start

    def to_batch(self, source_index: int) -> Batch:
        slot_read = SlotRead(source_index, self._nbytes, tuple(self._parts), self._over_read)
        return Batch(source_index, slot_read, tuple(self._members))

    def _next_offset(self) -> int:
        return -(-self._nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _groups(ranges: Sequence[ItemRange], order: StreamOrder, max_gap_bytes: float) -> Iterator[RangeGroup]:
    """Group ranges that are fetched as one, in the order in which they are handed out."""
    if order != "input":
        yield from coalesce(ranges, max_gap_bytes=max_gap_bytes)
        return
    # Only neighbours in the input that ascend are joined. Others would have to wait in memory for their turn, and
    # memory would not stay bounded.
    for start, stop in _ascending_runs(ranges):
        for group in coalesce(ranges[start:stop], max_gap_bytes=max_gap_bytes):
            indices = tuple(start + index for index in group.indices)
            yield RangeGroup(group.start, group.end, group.item_ranges, indices)


def _ascending_runs(ranges: Sequence[ItemRange]) -> Iterator[tuple[int, int]]:
    """Cut the input into runs [start, stop) within which no range starts before its predecessor."""
    start = 0
    for position in range(1, len(ranges) + 1):
        if position == len(ranges) or ranges[position].start < ranges[position - 1].start:
            yield start, position
            start = position


def _cut_between_ranges(group: RangeGroup, most_bytes: int) -> Iterable[RangeGroup]:
    """Cut a group into groups of at most ``most_bytes``, but never through a range or between overlapping ones.

    Without it, a thousand small ranges side by side would need one slot for all of them, and be given back together.
    """
    first, end = 0, group.start
    for position, item_range in enumerate(group.item_ranges):
        start = group.item_ranges[first].start
        if position > first and item_range.start >= end and item_range.end - start > most_bytes:
            yield RangeGroup(start, end, group.item_ranges[first:position], group.indices[first:position])
            first = position
        end = max(end, item_range.end)
    yield RangeGroup(group.item_ranges[first].start, end, group.item_ranges[first:], group.indices[first:])
