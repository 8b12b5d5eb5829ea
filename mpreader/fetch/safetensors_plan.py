"""Plan of a load from safetensors files: the bytes that are received for tensors, or boxes of them. Pure arithmetic.

The load takes its ranges from here, and ``mpreader inspect`` tells beforehand what they are. It works without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from mpreader.formats.gaps import best_gaps
from mpreader.formats.safetensors import BITS, StoredTensor, packed_shape
from mpreader.formats.selection import GAPS, Box, Gaps, Run, box_runs

__all__ = ["WantedBox", "cut_runs", "element_bytes", "plan_boxes"]

# With so many tensors no plan of yet more requests is the quickest, and making one takes its time, too.
_MANY: Final = 1000


class WantedBox(NamedTuple):
    """Tensor that is wanted, or a box of it.

    Attributes:
        source: Its file.
        stored: What the header says of it.
        box: The box, in the dimensions of :func:`~mpreader.formats.safetensors.packed_shape`; None: the whole tensor.
    """

    source: str
    stored: StoredTensor
    box: Box | None


def element_bytes(stored: StoredTensor) -> int:
    """Return the bytes of one element of the packed shape of a tensor."""
    return max(1, BITS[stored.dtype] // 8)


def plan_boxes(wanted: Sequence[WantedBox]) -> tuple[list[list[Run]], int]:
    """Return the runs of each box, as bytes of its file, and the largest gap that is received between two of them.

    Of all plans that would not take much longer than the quickest one, the one of the fewest bytes is taken.
    """
    possible = GAPS if len(wanted) <= _MANY else GAPS[1:]
    if all(one.box is None for one in wanted):  # the same runs, whatever the gaps
        whole = [_runs_of(one, GAPS[0]) for one in wanted]
        return whole, best_gaps(lambda _: _by_file(wanted, whole), possible).between_records
    plans = {gaps: [_runs_of(one, gaps) for one in wanted] for gaps in possible}
    gaps = best_gaps(lambda gaps: _by_file(wanted, plans[gaps]), possible)
    return plans[gaps], gaps.between_records


def cut_runs(
    wanted: Sequence[WantedBox], runs: Sequence[Sequence[Run]], piece_bytes: int
) -> dict[str, list[tuple[int, int]]]:
    """Return the ranges to receive of each file, cut into pieces: a tensor may be larger than shared memory."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for one, of_tensor in zip(wanted, runs, strict=True):
        of_file = ranges.setdefault(one.source, [])
        for run in of_tensor:
            of_file.extend((start, min(start + piece_bytes, run.end)) for start in range(*run, piece_bytes))
    return {source: of_file for source, of_file in ranges.items() if of_file}


def _by_file(wanted: Sequence[WantedBox], runs: Sequence[Sequence[Run]]) -> list[list[Run]]:
    files: dict[str, list[Run]] = {}
    for one, of_tensor in zip(wanted, runs, strict=True):
        files.setdefault(one.source, []).extend(of_tensor)
    return list(files.values())


def _runs_of(wanted: WantedBox, gaps: Gaps) -> list[Run]:
    start, end = wanted.stored.start, wanted.stored.end
    runs = None
    if wanted.box is not None:
        size, itemsize = packed_shape(wanted.stored), element_bytes(wanted.stored)
        runs = box_runs(size, wanted.box, itemsize, max_gap_bytes=gaps.within_box)
    if runs is None:
        return [Run(start, end)] if end > start else []
    return [Run(start + run.start, start + run.end) for run in runs]
