"""Fetch planner: packs the ranges of a call into slots of shared memory, and cuts them into requests.

It is used by the engine; streams and results find the bytes of each range by the plan. It is pure: it must not use a
pool or a client, nor make requests.

Ranges that are near each other form a group, which is fetched as one. The groups in one slot are a *batch*: they are
ranges of one object, and their memory is received, taken and given back together::

    object    [0][1]  gap  [2]    large gap    [3]                    [4]
    groups    [0 .. 3                            ]                    [4]
    slot      [0][1]  gap  [2][3] padding [4]

A large gap is received, but not kept: for scattered ranges, gaps are most of what is received, and touching fresh
memory costs more than receiving. Sources are numbered in the order of the call; that number is the *source index*.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from mpreader.fetch.arguments import StreamOrder
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import Source
from mpreader.ranges import ItemRange, Part, RangeGroup, coalesce, partition

__all__ = ["Batch", "FetchPlan", "Member", "PieceOrigin", "cut_into_pieces", "plan_batches"]

# Each group starts at a multiple of this in its slot, so that arrays of any type can be made on the memory of a view.
_ALIGNMENT_BYTES: Final = 64
# A gap of less is kept: to skip it costs two more receives. The more of them a request may have, the longer is the
# message about it, which must fit into one packet of a worker's socket.
_LEAST_SKIP_BYTES: Final = 16 * 1024
_MOST_SKIPS: Final = 512  # of one request


class Member(NamedTuple):
    """Place of one range in the slot of its batch.

    Attributes:
        position: Position of the range among those of its source; if ranges were cut, position of the piece.
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
        slot_read: Work for the pool: the requests that fill the slot.
        members: Places of the ranges in the slot, sorted by their offsets in the object within each group.
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
    """Plan of a whole call. Its lists have one entry for each source, at the source index, except ``batches``.

    Attributes:
        uris: Names of the sources, as the caller gave them.
        sources: The sources.
        ranges: Ranges of each source, in the order of the input.
        batches: All batches, in the order in which they are read. Each range that is not empty is in exactly one; if
            ranges were cut, each piece is.
        origins: Origin of each piece of a source, by the position of the piece. Empty if ranges were not cut.
    """

    uris: list[str]
    sources: list[Source]
    ranges: list[list[ItemRange]]
    batches: list[Batch]
    origins: list[list[PieceOrigin]]

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots together, padding and the gaps that are kept included."""
        return sum(batch.slot_read.nbytes for batch in self.batches)

    @property
    def largest_range_bytes(self) -> int:
        """Bytes of the largest range; 0 if there are no ranges."""
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
        order: Order in which ranges are handed out. With ``"input"`` the batches keep the order of the input; with the
            others they are sorted by offset.
        max_gap_bytes: Largest gap between two ranges that are fetched as one.
        part_bytes: Largest number of bytes of one request.
        slot_bytes: Bytes of the object, gaps included, for one slot, which is shared by as many groups as fit. A range
            that is larger gets a larger slot for itself; so do overlapping ranges that together are larger.

    Returns:
        The batches, in the order in which they are read.
    """
    slot = _Slot()
    for group in _groups(ranges, order, max_gap_bytes):
        for chunk in _cut_between_ranges(group, slot_bytes):
            # An empty slot takes any chunk: one that is larger than slot_bytes can't be cut further.
            if not slot.is_empty and slot.span_with(chunk) > slot_bytes:
                yield slot.to_batch(source_index)
                slot = _Slot()
            slot.add(chunk, part_bytes)
    if not slot.is_empty:
        yield slot.to_batch(source_index)


def cut_into_pieces(ranges: Sequence[ItemRange], piece_bytes: int) -> tuple[list[ItemRange], list[PieceOrigin]]:
    """Cut ranges into pieces of at most ``piece_bytes``, so that a range may be larger than shared memory.

    Returns:
        The pieces, and the origin of each. An empty range has no pieces.
    """
    pieces, origins = [], []
    for range_index, item_range in enumerate(ranges):
        for start in range(item_range.start, item_range.end, piece_bytes):
            pieces.append(ItemRange(start, min(start + piece_bytes, item_range.end)))
            origins.append(PieceOrigin(range_index, start - item_range.start))
    return pieces, origins


class _Slot:
    """A slot that is being filled with groups of one source, one after the other."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._span = 0  # what `_nbytes` would be if all gaps were kept: a slot must not wait for too many requests
        self._over_read = 0  # bytes of gaps within requests, for statistics; gaps that are not requested don't count
        self._parts: list[Part] = []
        self._members: list[Member] = []

    @property
    def is_empty(self) -> bool:
        return not self._parts

    def span_with(self, group: RangeGroup) -> int:
        """Number of bytes that the slot would have with the group added, and all gaps kept."""
        return _aligned(self._span) + group.end - group.start

    def add(self, group: RangeGroup, part_bytes: int) -> None:
        """Append a group, cut into requests of at most ``part_bytes``."""
        slot_offset = _aligned(self._nbytes)
        layout = _Layout(group, slot_offset, max(_LEAST_SKIP_BYTES, part_bytes // _MOST_SKIPS))
        for part in partition(group, part_bytes=part_bytes):
            place = layout.place_of(part.start)
            self._parts.append(Part(part.start, part.end, part.over_read, place, layout.skips_of(part)))
            self._over_read += part.over_read
        self._members += [
            Member(position, layout.place_of(item_range.start), item_range.end - item_range.start)
            for position, item_range in zip(group.indices, group.item_ranges, strict=True)
        ]
        self._span = self.span_with(group)
        self._nbytes = layout.end

    def to_batch(self, source_index: int) -> Batch:
        slot_read = SlotRead(source_index, self._nbytes, tuple(self._parts), self._over_read)
        return Batch(source_index, slot_read, tuple(self._members))


class _Layout:
    """Places of the bytes of a group in its slot, without the large gaps between its ranges.

    Args:
        group: The group.
        slot_offset: Offset of its first byte in the slot.
        least_skip: Size of the smallest gap that is left out.

    Attributes:
        end: One past the last byte of the group in the slot.
    """

    def __init__(self, group: RangeGroup, slot_offset: int, least_skip: int) -> None:
        self._skips: list[tuple[int, int]] = []
        # For each skip, and for the time before the first one: what, added to an offset in the object, gives the
        # offset in the slot. It holds from the end of the skip on.
        self._starts = [group.start]
        self._shifts = [slot_offset - group.start]
        end = group.start
        for item_range in group.item_ranges:
            if item_range.start - end >= least_skip:
                self._skip(end, item_range.start)
            end = max(end, item_range.end)
        self.end = group.end + self._shifts[-1]

    def place_of(self, offset: int) -> int:
        """Return the offset in the slot of a byte of a range."""
        return offset + self._shifts[bisect.bisect_right(self._starts, offset) - 1]

    def skips_of(self, part: Part) -> tuple[tuple[int, int], ...]:
        """Return the skips within a request. A gap that is not requested is left out of the slot just the same."""
        first = bisect.bisect_left(self._skips, (part.start, 0))
        last = bisect.bisect_left(self._skips, (part.end, 0))
        return tuple(self._skips[first:last])

    def _skip(self, start: int, end: int) -> None:
        # A whole number of alignments: ranges lie as they would if the gap were kept.
        nbytes = (end - start) // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
        self._skips.append((end - nbytes, end))
        self._starts.append(end)
        self._shifts.append(self._shifts[-1] - nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _groups(ranges: Sequence[ItemRange], order: StreamOrder, max_gap_bytes: float) -> Iterator[RangeGroup]:
    """Group the ranges that are fetched as one; yields the groups in the order in which they are handed out."""
    if order != "input":
        yield from coalesce(ranges, max_gap_bytes=max_gap_bytes)
        return
    # Only neighbours in the input that ascend are joined. A group of others would hold ranges that are handed out much
    # later, and their slots would fill the memory until then.
    for start, stop in _ascending_runs(ranges):
        for group in coalesce(ranges[start:stop], max_gap_bytes=max_gap_bytes):
            # coalesce() counts within the run; members are counted within the whole input.
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

    Without this cut, a thousand small ranges side by side would need one slot for all of them, whose memory would be
    given back only when all of them have been dropped.
    """
    first, end = 0, group.start  # first: position of the first range that was not yielded; end: of all ranges so far
    for position, item_range in enumerate(group.item_ranges):
        start = group.item_ranges[first].start
        # The ranges are sorted by start: one that starts at the end of all earlier ones, or later, overlaps none.
        if position > first and item_range.start >= end and item_range.end - start > most_bytes:
            yield RangeGroup(start, end, group.item_ranges[first:position], group.indices[first:position])
            first = position
        end = max(end, item_range.end)
    yield RangeGroup(group.item_ranges[first].start, end, group.item_ranges[first:], group.indices[first:])
