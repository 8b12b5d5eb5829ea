"""Host plan: the read that the ranks of a host share, from what each of them needs. Pure arithmetic.

Each rank tells the leader what it needs of each stored item: all of it, or runs of it. The leader joins these needs::

    rank 0   rows 0-1   ████████░░░░░░░░       item of which all ranks together need nearly everything:
    rank 1   rows 2-3   ░░░░░░░░████████         it is received whole, once, and can be verified
    rank 2   rows 0-1   ████████░░░░░░░░       other items: the union of the runs, each byte once

and cuts the union into requests, once. Each rank subscribes to those parts that hold something of what it needs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from mpreader.dcp.planned import OWN_CHECK, Check, Verdict
from mpreader.formats.gaps import best_gaps
from mpreader.formats.selection import Gaps, Run, Selection, is_worth_selecting, joined_runs, placed_runs
from mpreader.pool.hosts.messages import SharedRead, Subscription
from mpreader.pool.requests import SlotRead
from mpreader.ranges import ItemRange, Part, plan_files

__all__ = ["Answer", "ItemNeed", "Need", "plan_host", "taken_runs", "takes_all"]

# Of an item of more parts than this, a rank takes those that it needs, though all of them are received. It would keep
# the others until it has come to the end of the item, and memory may have no room for it.
_MOST_PARTS_TAKEN: Final = 4


class ItemNeed(NamedTuple):
    """Need that a rank has of one stored item: all of it, or the boxes that it loads.

    Attributes:
        offset: First byte of the item in its file.
        nbytes: Bytes of the item.
        selections: What it needs; None: all of it.
    """

    offset: int
    nbytes: int
    selections: tuple[Selection, ...] | None


class Need(NamedTuple):
    """Needs of one rank, for its whole load; it tells them to the leader.

    Attributes:
        files: Its items by the URI of their file; files and items are in the order in which it reads them.
        verifies: True if it compares checksums.
    """

    files: Mapping[str, Sequence[ItemNeed]]
    verifies: bool


class Answer(NamedTuple):
    """Answer of the leader to the needs of one rank: its part of the shared read.

    Attributes:
        checks: For each file, by URI: for each item of the rank's need, who verifies it, if it is received whole; None
            if only what the ranks need of it is received.
        parts: For each file, by URI, the parts that the rank takes; they are its slot reads, one after the other.
        large_nbytes: Of items of more bytes, a rank that does not verify them takes what it needs only.
    """

    checks: dict[str, list[Check | None]]
    parts: dict[str, list[Part]]
    large_nbytes: int


def takes_all(item: ItemNeed, check: Check | None, answer: Answer) -> bool:
    """Returns True if a rank takes all of an item, of which it was told who verifies it."""
    if item.selections is None:
        return True
    return check is not None and (check.is_own or item.nbytes <= answer.large_nbytes)


def taken_runs(item: ItemNeed, check: Check | None, answer: Answer) -> list[Run]:
    """Returns what a rank takes of an item, as bytes of its file."""
    if item.selections is None or takes_all(item, check, answer):
        return [Run(item.offset, item.offset + item.nbytes)]
    return [run for selection in item.selections for run in placed_runs(selection, item.offset)]


class _Union:
    """Union of what all ranks need of one item: all of it, or some runs."""

    __slots__ = ("nbytes", "runs")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.runs: list[Run] | None = []

    def add(self, selections: Iterable[Selection] | None) -> None:
        if selections is None:
            self.runs = None
        elif self.runs is not None:
            for selection in selections:
                self.runs += placed_runs(selection, 0)

    def is_selected(self, gaps: Gaps) -> bool:
        return self.runs is not None and is_worth_selecting(self.nbytes, joined_runs(self.runs, 0), gaps)


def plan_host(needs: Sequence[Need], *, max_gap_bytes: float, part_bytes: int) -> tuple[list[str], SharedRead]:
    """Plan the read that ranks share.

    Args:
        needs: What each rank needs.
        max_gap_bytes: Largest gap that is received between two items that are received whole.
        part_bytes: Largest number of bytes of one request.

    Returns:
        The URIs of its files, which are its sources, and the read.
    """
    union = _join(needs)
    has_runs = any(item.runs is not None for items in union.values() for item in items.values())
    gaps = best_gaps(lambda gaps: _placed(union, gaps)) if has_runs else None
    selected = {
        uri: {offset for offset, item in items.items() if gaps is not None and item.is_selected(gaps)}
        for uri, items in union.items()
    }
    ranges = {uri: [ItemRange(*run) for run in _runs_of_file(items, selected[uri])] for uri, items in union.items()}
    small_gaps = {uri: gaps.between_records for uri in union if gaps is not None and selected[uri]}
    plans = plan_files(ranges, max_gap_bytes=max_gap_bytes, part_bytes=part_bytes, max_gap_by_file=small_gaps)
    parts = {uri: plan.parts for uri, plan in plans.items()}
    uris = list(parts)
    slot_reads = [
        SlotRead(number, part.size, (part,), part.over_read) for number, uri in enumerate(uris) for part in parts[uri]
    ]
    verdicts = _choose_verifiers(needs, selected)
    subscriptions = []
    for place, need in enumerate(needs):
        checks = {
            uri: [
                None if item.offset in selected[uri] else _check_of(item, place, verdicts.get((uri, item.offset)))
                for item in items
            ]
            for uri, items in need.files.items()
        }
        subscriptions.append(_subscribe(need, Answer(checks, {}, _MOST_PARTS_TAKEN * part_bytes), parts))
    return uris, SharedRead(tuple(slot_reads), tuple(subscriptions), notes=len(verdicts))


def _join(needs: Sequence[Need]) -> dict[str, dict[int, _Union]]:
    """Join the needs; files and items come in the order in which every rank reads those that it needs."""
    union: dict[str, dict[int, _Union]] = {}
    for need in needs:
        for uri, items in need.files.items():
            of_file = union.setdefault(uri, {})
            for item in items:
                if item.offset not in of_file:
                    of_file[item.offset] = _Union(item.nbytes)
                of_file[item.offset].add(item.selections)
    return {uri: dict(sorted(union[uri].items())) for uri in sorted(union)}


def _placed(union: Mapping[str, Mapping[int, _Union]], gaps: Gaps) -> list[list[Run]]:
    """Returns what would be received of each file of which something is selected."""
    files = []
    for items in union.values():
        if any(item.runs is not None for item in items.values()):
            selected = {offset for offset, item in items.items() if item.is_selected(gaps)}
            files.append(_runs_of_file(items, selected))
    return files


def _runs_of_file(items: Mapping[int, _Union], selected: set[int]) -> list[Run]:
    runs = []
    for offset, item in items.items():
        if offset in selected and item.runs is not None:
            runs += [Run(offset + start, offset + end) for start, end in joined_runs(item.runs, 0)]
        else:
            runs.append(Run(offset, offset + item.nbytes))
    return runs


def _choose_verifiers(needs: Sequence[Need], selected: Mapping[str, set[int]]) -> dict[tuple[str, int], Verdict]:
    """Choose a rank for each item that is received whole, though not all ranks want it whole: it verifies it for all.

    Returns:
        The verdicts, by URI and offset of the item. The ranks verify about as many bytes each, where there is a choice.
    """
    wanting: dict[tuple[str, int], list[tuple[int, ItemNeed]]] = {}
    for place, need in enumerate(needs):
        for uri, items in need.files.items() if need.verifies else ():
            for item in items:
                if item.offset not in selected[uri]:
                    wanting.setdefault((uri, item.offset), []).append((place, item))
    loads = [0] * len(needs)
    verdicts: dict[tuple[str, int], Verdict] = {}
    for key, wants in wanting.items():
        whole = [place for place, item in wants if item.selections is None]  # they verify it in any case
        if len(whole) < len(wants):
            place = min(whole or [place for place, _ in wants], key=loads.__getitem__)
            loads[place] += wants[0][1].nbytes
            verdicts[key] = Verdict(place, len(verdicts))
    return verdicts


def _check_of(item: ItemNeed, place: int, verdict: Verdict | None) -> Check:
    is_verifier = verdict is not None and verdict.place == place
    if item.selections is None and not is_verifier:
        return OWN_CHECK
    return Check(is_verifier, verdict)


def _subscribe(need: Need, answer: Answer, parts: Mapping[str, Sequence[Part]]) -> Subscription:
    """Returns what a rank takes of the parts, and fills in its answer."""
    starts = dict(zip(parts, accumulate(map(len, parts.values()), initial=0), strict=False))
    numbers = {uri: number for number, uri in enumerate(parts)}
    indices: list[int] = []
    for uri, items in need.files.items():
        taken = _taken_parts(items, answer, uri, parts[uri])
        answer.parts[uri] = [parts[uri][index] for index in taken]
        indices += [starts[uri] + index for index in taken]
    return Subscription(answer, tuple(indices), tuple(numbers[uri] for uri in need.files))


def _taken_parts(items: Iterable[ItemNeed], answer: Answer, uri: str, parts: Sequence[Part]) -> list[int]:
    """Returns the indices of the parts of a file that hold something of what a rank takes."""
    starts, ends = [part.start for part in parts], [part.end for part in parts]
    taken: set[int] = set()
    for item, check in zip(items, answer.checks[uri], strict=True):
        for start, end in taken_runs(item, check, answer):
            taken.update(range(bisect_right(ends, start), bisect_left(starts, end)))
    return sorted(taken)
