"""Planning of byte ranges: groups ranges that are cheaper to fetch together, and cuts the groups into requests.

Used by readers and fetchers, and by ``mpreader inspect`` to show the requests of a load. It must stay pure arithmetic:
it knows no objects, no pool and no network, and every plan depends on its arguments only.

Ranges are half-open: ``start`` is the first byte, ``end`` is one past the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from mpreader.errors import PlanError

__all__ = [
    "DEFAULT_MAX_GAP_SIZE",
    "MAX_LOAD_GAP_BYTES",
    "FilePlan",
    "ItemRange",
    "Part",
    "RangeGroup",
    "check_max_gap",
    "clusters",
    "coalesce",
    "coverage",
    "estimated_seconds",
    "gap_worth_receiving",
    "partition",
    "plan_files",
]

_CONNECTION_BYTES_PER_S: Final = 90_000_000  # of S3, on one connection
_FIRST_BYTE_S: Final = 0.03  # what a connection waits for the first byte of an answer of S3, at best
_CONNECTIONS: Final = 32  # of a load on a host of few cores


def gap_worth_receiving(request_s: float) -> int:
    """Return the largest gap between two ranges, in bytes, that is cheaper to receive than to leave out.

    Leaving a gap out costs one more request, and its connection waits for the first byte. Receiving the gap costs the
    time that a connection takes for its bytes, at S3's rate of about 90 MB/s.

    Args:
        request_s: Seconds that one more request costs. For S3 0.01 to 0.03: other connections receive while one waits
            for its first byte, which hides a part of that wait.
    """
    # Rounded down to a power of two, since the rate is known only roughly.
    return 1 << (int(request_s * _CONNECTION_BYTES_PER_S).bit_length() - 1)


def estimated_seconds(requests: int, nbytes: int, longest_nbytes: int) -> float:
    """Return how long S3 takes for some requests at least, to compare plans of the same load with each other.

    Args:
        requests: Number of requests.
        nbytes: Bytes of all of them together.
        longest_nbytes: Bytes of the longest one.
    """
    if not requests:
        return 0.0
    shared_s = (requests * _FIRST_BYTE_S + nbytes / _CONNECTION_BYTES_PER_S) / _CONNECTIONS
    return max(shared_s, _FIRST_BYTE_S + longest_nbytes / _CONNECTION_BYTES_PER_S)


# The default of the public argument ``max_gap_size`` of loads, the same as in s3torchconnector. It is so large because
# the dcp_optimized reader streams a group by a single request, and another group needs another stream.
DEFAULT_MAX_GAP_SIZE: Final = 32 * 1024 * 1024
# The largest gap that loads through the pool receive, however large ``max_gap_size`` is: 2 MiB.
MAX_LOAD_GAP_BYTES: Final = gap_worth_receiving(request_s=0.025)


@dataclass(frozen=True, slots=True)
class ItemRange:
    """Bytes of one item of an object, such as a tensor.

    Attributes:
        start: First byte, counted from the start of the object.
        end: One past the last byte; equal to ``start`` for an item without bytes.

    Raises:
        PlanError: ``start`` and ``end`` are not whole numbers with ``0 <= start <= end``.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not (_is_int(self.start) and _is_int(self.end) and 0 <= self.start <= self.end):
            raise PlanError(
                f"a byte range needs whole numbers with 0 <= start <= end, got start={self.start!r}, end={self.end!r}"
            )

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RangeGroup:
    """Ranges that are so close together that they are fetched as one, including the gaps.

    Attributes:
        start: First byte of the group.
        end: One past the last byte of the group.
        item_ranges: The ranges, none empty, sorted by start.
        indices: For each of ``item_ranges``, its position in the input of :func:`coalesce`.
    """

    start: int
    end: int
    item_ranges: tuple[ItemRange, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one request.

    Attributes:
        start: First byte, counted from the start of the object.
        end: One past the last byte.
        over_read: Number of bytes between ``start`` and ``end`` that belong to no item, being in gaps.
        slot_offset: Offset in its slot of shared memory at which the part's first byte is received.
        skips: Stretches ``(start, end)`` of the object within the part, sorted and disjoint, that are received and not
            kept: in the slot, the byte behind a skip follows the byte before it.
    """

    start: int
    end: int
    # Not compared: two parts of the same bytes are equal.
    over_read: int = field(default=0, compare=False)
    slot_offset: int = field(default=0, compare=False)
    skips: tuple[tuple[int, int], ...] = field(default=(), compare=False)

    @property
    def size(self) -> int:
        """Number of bytes of the request."""
        return self.end - self.start

    @property
    def kept_bytes(self) -> int:
        """Number of bytes that the part takes in its slot."""
        return self.end - self.start - sum(end - start for start, end in self.skips)

    def rest(self, received: int) -> Part:
        """Return what is left of the part when its first ``received`` bytes are there; its over-read is not counted."""
        if not received:
            return self
        start = self.start + received
        skips = tuple((max(start, skip), end) for skip, end in self.skips if end > start)
        left = self.end - start - sum(end - skip for skip, end in skips)
        return Part(start, self.end, slot_offset=self.slot_offset + self.kept_bytes - left, skips=skips)

    def first(self, nbytes: int) -> Part:
        """Return a part of the first ``nbytes`` requested bytes; its over-read is not counted."""
        end = self.start + nbytes
        skips = tuple((skip, min(skip_end, end)) for skip, skip_end in self.skips if skip < end)
        return Part(self.start, end, slot_offset=self.slot_offset, skips=skips)


def check_max_gap(value: object) -> None:
    """Check the public argument ``max_gap_size``: the largest gap, in bytes, that is fetched.

    Raises:
        TypeError: ``value`` is neither int nor float.
        ValueError: ``value`` is negative or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"max_gap_size must be int or float, got {type(value).__name__}")
    if not value >= 0:  # written so that NaN is refused as well
        raise ValueError(f"max_gap_size must be non-negative, got {value!r}")


def coalesce(ranges: Sequence[ItemRange], *, max_gap_bytes: float) -> list[RangeGroup]:
    """Group the ranges that are at most ``max_gap_bytes`` apart.

    Args:
        ranges: Ranges in any order; they may repeat, overlap and nest. Empty ones belong to no group.
        max_gap_bytes: Largest gap inside a group. 0 joins ranges that touch or overlap, ``float("inf")`` joins all.

    Returns:
        The groups, sorted, more than ``max_gap_bytes`` apart.

    Raises:
        TypeError: ``max_gap_bytes`` is not a number.
        ValueError: ``max_gap_bytes`` is negative or NaN.
    """
    check_max_gap(max_gap_bytes)
    return [
        RangeGroup(hull.start, hull.end, tuple(ranges[index] for index in indices), tuple(indices))
        for hull, indices in _join(ranges, max_gap_bytes)
    ]


def partition(group: RangeGroup, *, part_bytes: int) -> list[Part]:
    """Cut a group into requests.

    Cuts fall between items wherever that is possible, and a gap at a cut is not fetched. An item that exceeds
    ``part_bytes`` is cut into even parts; overlapping items count as one item here.

    Args:
        group: Group of ranges.
        part_bytes: Largest number of bytes of one part, at least 1.

    Returns:
        The parts, sorted and disjoint. Together they hold every byte of every item exactly once; each
        starts and ends with a byte of an item.

    Raises:
        PlanError: ``part_bytes`` is not a whole number of at least 1.
    """
    if not _is_int(part_bytes) or part_bytes < 1:
        raise PlanError(f"part_bytes must be a whole number of at least 1, got {part_bytes!r}")
    parts: list[Part] = []
    for cluster in clusters(group.item_ranges):
        # If the last part has room for the gap and the cluster, it gets both. Otherwise the cluster needs another
        # request anyway, and the gap is left out.
        if parts and cluster.end - parts[-1].start <= part_bytes:
            last = parts[-1]
            parts[-1] = Part(last.start, cluster.end, last.over_read + cluster.start - last.end)
        else:
            parts.extend(_cut_evenly(cluster, part_bytes))
    return parts


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Requests of one file.

    Attributes:
        groups: Number of range groups.
        parts: Parts, one for each request, sorted and disjoint; none if all ranges are empty.
    """

    groups: int
    parts: list[Part]


def plan_files(
    ranges_by_file: Mapping[str, Sequence[ItemRange]],
    *,
    max_gap_bytes: float,
    part_bytes: int,
    max_gap_by_file: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, FilePlan]:
    """Cut the ranges of a load into requests.

    Args:
        ranges_by_file: Ranges by URI.
        max_gap_bytes: Largest gap within one request. Values above ``MAX_LOAD_GAP_BYTES`` count as that.
        part_bytes: Largest number of bytes of one request, at least 1.
        max_gap_by_file: Smaller bounds than ``max_gap_bytes`` for some files, by URI.

    Returns:
        The requests by URI, in the order of ``ranges_by_file``.

    Raises:
        TypeError: ``max_gap_bytes`` is not a number.
        ValueError: ``max_gap_bytes`` is negative.
        PlanError: ``part_bytes`` is not a whole number of at least 1.
    """
    bound = min(max_gap_bytes, MAX_LOAD_GAP_BYTES)
    plans = {}
    for uri, ranges in ranges_by_file.items():
        groups = coalesce(ranges, max_gap_bytes=min(bound, max_gap_by_file.get(uri, bound)))
        parts = [part for group in groups for part in partition(group, part_bytes=part_bytes)]
        plans[uri] = FilePlan(len(groups), parts)
    return plans


def coverage(ranges: Sequence[ItemRange]) -> list[ItemRange]:
    """Return the bytes that the ranges cover, as sorted intervals that neither overlap nor touch."""
    return [hull for hull, _ in _join(ranges, 0)]


def clusters(ranges: Sequence[ItemRange]) -> list[ItemRange]:
    """Join only ranges that share a byte.

    Returns:
        The joined ranges, sorted; two neighbours may touch. Between two of them the object can be cut without cutting
        through a range.
    """
    # Touching ranges have a gap of 0, ranges that share a byte one of -1 or less.
    return [hull for hull, _ in _join(ranges, -1)]


def _join(ranges: Sequence[ItemRange], max_gap: float) -> Iterator[tuple[ItemRange, list[int]]]:
    """Join non-empty ranges that are at most ``max_gap`` apart.

    Yields:
        From the lowest to the highest: the range from the first to the last byte of the joined ranges, and the indices
        of these in ``ranges``, sorted by their starts.
    """
    by_start = sorted((i for i, r in enumerate(ranges) if r.start < r.end), key=lambda i: ranges[i].start)
    start, end, indices = 0, 0, list[int]()
    for index in by_start:
        item = ranges[index]
        if indices and item.start - end > max_gap:
            yield ItemRange(start, end), indices
            indices = []
        if not indices:
            start, end = item.start, item.end
        indices.append(index)
        end = max(end, item.end)  # max, since the range may lie within an earlier one
    if indices:
        yield ItemRange(start, end), indices


def _cut_evenly(cluster: ItemRange, part_bytes: int) -> Iterator[Part]:
    # As few parts as part_bytes allows, all of nearly the same size. Full parts with a small rest would spend a whole
    # request on few bytes.
    count = -(-cluster.size // part_bytes)
    cuts = [cluster.start + cluster.size * i // count for i in range(count + 1)]
    return map(Part, cuts[:-1], cuts[1:])


def _is_int(value: object) -> bool:
    # True and False are ints to Python, and would pass for the numbers 1 and 0.
    return isinstance(value, int) and not isinstance(value, bool)
