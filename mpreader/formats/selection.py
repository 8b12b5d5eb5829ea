"""Selection: finds the bytes of a stored tensor that a box of it needs, and decides if they are worth selecting.

The storage reader of DCP plans and checks its requests with it, and the copier of tensors copies by the same rules. It
is pure arithmetic: it knows no file, no pool and no torch.

A *box* is a range of indices in each dimension. In a C-contiguous tensor, the elements of a box lie in stretches of
bytes at regular distances::

    tensor [6, 8], box rows 1-3, columns 2-5     . . . . . . . .
                                                 . . # # # # . .   ┐
                                                 . . # # # # . .   │ one run, where the gaps between the rows of the
                                                 . . # # # # . .   ┘ box are cheap; three of them, where they are not
                                                 . . . . . . . .

A *run* is what is requested: stretches with such gaps between them as are cheaper to receive than to leave out. A box
of leading rows, all columns, is one run without a gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from mpreader.errors import PlanError
from mpreader.ranges import MAX_LOAD_GAP_BYTES, gap_worth_receiving

__all__ = [
    "GAPS",
    "Box",
    "Gaps",
    "Run",
    "Selection",
    "box_of",
    "box_runs",
    "contiguous_order",
    "index_in_memory",
    "is_worth_selecting",
    "joined_runs",
    "placed_runs",
    "select_box",
    "shard_box",
    "stored_runs",
]

Box = tuple[tuple[int, int], ...]
"""First index and length in each dimension of a stored tensor."""


class Gaps(NamedTuple):
    """Largest gaps that a load receives, in bytes.

    Attributes:
        between_records: Between the runs and fronts of records of which boxes are wanted. A record of which no more
            than this could be left out is taken whole, for only then can its checksum be compared.
        within_box: Within a run.
    """

    between_records: int
    within_box: int


# From the fewest bytes to the fewest requests. In a load of few boxes most connections are idle, and one more request
# costs no time; in one of thousands each request delays the others. Within a box no gap of 512 KiB or less is left out:
# the copier reads blocks of rows of this size.
GAPS: Final = (
    Gaps(gap_worth_receiving(request_s=0.0005), gap_worth_receiving(request_s=0.006)),
    Gaps(gap_worth_receiving(request_s=0.002), MAX_LOAD_GAP_BYTES),
    Gaps(MAX_LOAD_GAP_BYTES, MAX_LOAD_GAP_BYTES),
)
# A record of which a smaller share could be left out is taken whole.
_LEAST_SAVED_SHARE: Final = 1 / 32
# Nor is a record selected from in more requests than this. The metadata of a checkpoint, which is not trusted, says how
# large a tensor is: without a bound it could ask for any number of runs.
_MOST_RUNS: Final = 10_000


class Run(NamedTuple):
    """Bytes ``[start, end)`` of a record, or of a payload."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.end - self.start


class Selection(NamedTuple):
    """Bytes of a record that a box of its tensor needs, as far as that is known before the record is read.

    Attributes:
        front_nbytes: Bytes from the start of the record on that certainly hold all that comes before the payload.
        runs: The runs, counted from the start of the record, in ascending order. They are as much longer than what is
            needed as the place of the payload is uncertain.
        max_gap_bytes: Largest gap within a run.
    """

    front_nbytes: int
    runs: tuple[Run, ...]
    max_gap_bytes: int


def box_of(size: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> Box:
    """Returns a box with one entry for every dimension of a tensor.

    Args:
        size: Shape of the tensor.
        offsets: First index of the box in each dimension, outermost first; further dimensions are taken whole.
        lengths: Length of the box in each dimension. As in DCP, a length that is not less than that of the tensor takes
            all of the dimension.

    Raises:
        PlanError: The box is not inside of the tensor.
    """
    if len(offsets) != len(lengths) or len(offsets) > len(size):
        raise PlanError(f"offsets {list(offsets)} and lengths {list(lengths)} don't fit a tensor of {list(size)}")
    box = [(0, whole) for whole in size]
    for dim, (offset, length, whole) in enumerate(zip(offsets, lengths, size, strict=False)):
        if length < whole:  # else all of the dimension, as torch's narrow_tensor_by_index takes it
            box[dim] = (offset, length)
            if offset < 0 or length < 0 or offset + length > whole:
                raise PlanError(f"box at {list(offsets)} of {list(lengths)} is outside of a tensor of {list(size)}")
    return tuple(box)


def shard_box(size: Sequence[int], dim: int, rank: int, ranks: int) -> Box:
    """Returns the box of a tensor that a rank has, as torch's ``Shard`` divides it.

    Args:
        size: Shape of the tensor.
        dim: Dimension that is divided. A tensor that does not have it is on all ranks, whole.
        rank: The rank.
        ranks: Number of ranks.
    """
    box = [(0, whole) for whole in size]
    if dim < len(size):
        rows = -(-size[dim] // ranks)  # as torch.chunk does: the last shards may be shorter, or empty
        offset = min(size[dim], rank * rows)
        box[dim] = (offset, min(rows, size[dim] - offset))
    return tuple(box)


@lru_cache(maxsize=4096)  # the tensors of a checkpoint have few different shapes
def contiguous_order(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the dimensions, outermost in memory first; None if the elements don't fill memory without gaps."""
    # Two orders are tried: the tensor's own, which nearly all have, and that of descending strides. The stride of a
    # dimension of length 1 has no meaning, so it is not compared, and the second order puts such dimensions innermost.
    natural = range(len(size))
    by_stride = sorted(natural, key=lambda dim: (size[dim] == 1, -stride[dim]))
    for order in (tuple(natural), tuple(by_stride)):
        expected = 1
        for dim in reversed(order):
            if size[dim] != 1 and stride[dim] != expected:
                break
            expected *= size[dim]
        else:
            return order
    return None


def index_in_memory(size: Sequence[int], box: Box) -> int | None:
    """Returns the index of a box's first element, if all of its elements are next to each other; None if they aren't.

    Args:
        size: Shape of the tensor, which is C-contiguous.
        box: The box.
    """
    start = 0
    for dim, (offset, length) in enumerate(box):
        start += offset * math.prod(size[dim + 1 :])
        # Where the box is longer than 1 in a dimension, it is contiguous only if it takes all further dimensions whole.
        if length != 1 and box[dim + 1 :] != tuple((0, whole) for whole in size[dim + 1 :]):
            return None
    return start


def box_runs(size: Sequence[int], box: Box, itemsize: int, *, max_gap_bytes: int) -> list[Run] | None:
    """Find the runs of a box in a C-contiguous tensor.

    Args:
        size: Shape of the tensor.
        box: The box.
        itemsize: Bytes of one element.
        max_gap_bytes: Largest gap within a run.

    Returns:
        The runs, counted from the tensor's first byte, in ascending order and more than ``max_gap_bytes`` apart; none
        for an empty box. None if there are more than 10,000.
    """
    if not all(length for _, length in box):
        return []
    # From the innermost dimension outwards. The gap between two steps of a dimension is at least as large as that of
    # the dimension within it, so that from the first dimension that is not joined on, none is.
    nbytes = step = itemsize  # of a run so far; between two indices of the dimension
    start = 0
    apart: list[range] = []  # starts of the steps, relative to each other, for each dimension that is not joined
    for whole, (offset, length) in zip(reversed(size), reversed(box), strict=True):
        start += offset * step
        if length > 1:
            if step - nbytes <= max_gap_bytes:
                nbytes += (length - 1) * step
            else:
                apart.append(range(0, length * step, step))
        step *= whole
    if math.prod(map(len, apart)) > _MOST_RUNS:
        return None
    starts = [start + sum(steps) for steps in itertools.product(*reversed(apart))]
    return [Run(begin, begin + nbytes) for begin in starts]


def stored_runs(
    size: tuple[int, ...], stride: tuple[int, ...], storage_offset: int, itemsize: int, box: Box, max_gap_bytes: int
) -> list[Run] | None:
    """Find the runs of a box of a tensor of any strides.

    Args:
        size: Shape of the tensor.
        stride: Its strides, in elements.
        storage_offset: Its first element within the payload, in elements.
        itemsize: Bytes of one element.
        box: The box.
        max_gap_bytes: Largest gap within a run.

    Returns:
        As :func:`box_runs`, but counted from the start of the payload. None also for a tensor that has gaps or repeated
        elements: its payload is taken whole.
    """
    order = contiguous_order(size, stride)
    if order is None:
        return None
    sizes, boxes = [size[dim] for dim in order], tuple(box[dim] for dim in order)
    runs = box_runs(sizes, boxes, itemsize, max_gap_bytes=max_gap_bytes)
    return None if runs is None else list(_moved(runs, storage_offset * itemsize, storage_offset * itemsize))


@lru_cache(maxsize=4096)  # likewise
def select_box(
    size: tuple[int, ...], box: Box, itemsize: int, record_nbytes: int, payload: tuple[int, int], gaps: Gaps
) -> Selection | None:
    """Decide which bytes of a record to request for a box of its tensor, before anything of the record is read.

    Args:
        size: Shape of the tensor, which is taken to be C-contiguous: most are, and a wrong guess is found out when the
            front is read.
        box: The box.
        itemsize: Bytes of one element.
        record_nbytes: Bytes of the record.
        payload: Lowest and highest place in the record where the payload may begin.
        gaps: Largest gaps that the load receives.

    Returns:
        What to request; None if the whole record is cheaper, or costs so little more that it is better taken whole,
        since its checksum can be compared then.
    """
    runs = box_runs(size, box, itemsize, max_gap_bytes=gaps.within_box)
    if not runs:
        return None
    lowest, highest = payload
    moved = tuple(_moved(runs, lowest, highest))
    if moved[-1].end > record_nbytes:
        return None  # what the metadata says of the shape does not fit the record
    if not is_worth_selecting(record_nbytes, (Run(0, highest), *moved), gaps):
        return None
    return Selection(highest, moved, gaps.within_box)


def is_worth_selecting(record_nbytes: int, runs: Sequence[Run], gaps: Gaps) -> bool:
    """Returns True if enough of a record is left out for it not to be received, and verified, whole.

    Args:
        record_nbytes: Bytes of the record.
        runs: What is wanted of it, the front included, sorted by their starts.
        gaps: Largest gaps that the load receives.
    """
    saved, reached = 0, 0
    for start, end in (*runs, Run(record_nbytes, record_nbytes)):
        if start - reached > gaps.between_records:
            saved += start - reached
        reached = max(reached, end)
    return saved > int(record_nbytes * _LEAST_SAVED_SHARE)


def placed_runs(selection: Selection, offset: int) -> Iterator[Run]:
    """Yield what is received of a record, as bytes of its file, in which the record begins at ``offset``."""
    for start, end in (Run(0, selection.front_nbytes), *selection.runs):
        yield Run(offset + start, offset + end)


def joined_runs(runs: Iterable[Run], max_gap_bytes: int) -> list[Run]:
    """Returns the runs in ascending order, those joined that are at most ``max_gap_bytes`` apart."""
    joined: list[Run] = []
    for run in sorted(runs):
        if joined and run.start - joined[-1].end <= max_gap_bytes:
            joined[-1] = Run(joined[-1].start, max(joined[-1].end, run.end))
        else:
            joined.append(run)
    return joined


def _moved(runs: Sequence[Run], start_by: int, end_by: int) -> Iterator[Run]:
    return (Run(run.start + start_by, run.end + end_by) for run in runs)
