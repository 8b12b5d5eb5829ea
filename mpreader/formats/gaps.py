"""Gaps: chooses between requests of fewer bytes and fewer requests, for a load of parts of tensors. Pure arithmetic.

The planners of DCP and of safetensors files use it, alone and for the ranks of a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Final

from mpreader.formats.selection import GAPS, Gaps, Run, joined_runs
from mpreader.ranges import estimated_seconds

__all__ = ["best_gaps"]

# A plan may take so many times as long as the quickest one if it needs fewer bytes: the ranks of a host share its
# network interface, which the estimate does not know.
_MOST_SLOWDOWN: Final = 3.0
_PART_NBYTES: Final = 8 * 1024 * 1024  # of a request: the default, which is near enough to compare plans


def best_gaps(received: Callable[[Gaps], Iterable[Iterable[Run]]], possible: Sequence[Gaps] = GAPS) -> Gaps:
    """Return the gaps with which the fewest bytes are received, of those that S3 would serve in bearable time.

    Args:
        received: Returns what would be received of each file with such gaps, before these join it.
        possible: The gaps to choose from, from the fewest bytes to the fewest requests.
    """
    seconds = [_estimated_seconds(received(gaps), gaps.between_records) for gaps in possible]
    bearable_s = _MOST_SLOWDOWN * min(seconds)
    return next(gaps for gaps, gaps_s in zip(possible, seconds, strict=True) if gaps_s <= bearable_s)


def _estimated_seconds(files: Iterable[Iterable[Run]], max_gap_bytes: int) -> float:
    """Return how long the requests for what is received of some files would take."""
    requests = nbytes = longest = 0
    for start, end in chain.from_iterable(joined_runs(runs, max_gap_bytes) for runs in files):
        parts = -(-(end - start) // _PART_NBYTES)
        requests += parts
        nbytes += end - start
        longest = max(longest, (end - start) // max(1, parts))
    return estimated_seconds(requests, nbytes, longest)
