"""Rounds of the comparison: each measures every contender once, in another order each time.

Contenders alternate, so that a busy minute of the machine slows all of them. measure.py makes one measurement;
results.py computes the medians.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from cells import Cell
from checkpoints import BUCKET, Checkpoint, checkpoint_of
from fetches import SCATTERED, SCATTERED_BYTES
from measure import Failure, TooSlow, measure
from private import NotReplaced
from results import Results, Row
from servers import Site
from tasks import Job

__all__ = ["compare"]


def compare(cells: Sequence[Cell], sites: dict[str, Site], data: Path, rounds: int) -> Results:
    """Measure all cells.

    Raises:
        Failure: A contender failed, or delivered something else than what is stored.
    """
    rows = [Row(cell, _nbytes(cell.workload, data)) for cell in cells]
    started = time.monotonic()
    # Round 0 compares bytes and samples memory, which takes time; its seconds are not used.
    for number in range(rounds + 1):
        name = f"round {number} of {rounds}" if number else "checking bytes and memory"
        print(f"[{time.monotonic() - started:5.0f} s] {name}: {len(rows)} measurements{_left(started, number, rounds)}",
              flush=True)  # fmt: skip
        for row in _rotated(rows, number):
            if not row.note:  # a contender that was too slow, or can't be measured, is not tried again
                _measure(row, sites[row.cell.server], data, checking=number == 0)
    return Results(rows)


def _left(started: float, number: int, rounds: int) -> str:
    if number == 0:
        return ""
    minutes = (time.monotonic() - started) / number * (rounds + 1 - number) / 60
    return f", about {math.ceil(minutes)} min to go"


def _rotated(rows: list[Row], number: int) -> list[Row]:
    """Rows in the order of a round: group after group, and in each group another contender first in every round."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell.group, []).append(row)
    return [
        row
        for members in groups.values()
        for row in members[number % len(members) :] + members[: number % len(members)]
    ]


def _measure(row: Row, site: Site, data: Path, *, checking: bool) -> None:
    cell = row.cell
    job = Job(cell.contender, cell.workload, cell.targets == "fresh", site, data, checking)
    try:
        runs = measure(job)
    except TooSlow:
        row.note, row.rounds = "> 60 s", []
        print(f"  {cell}: longer than 60 s, not run again", flush=True)
    except NotReplaced as error:
        row.note = "not run"
        print(f"  {cell}: not run: {error}", flush=True)
    except Failure as failure:
        raise Failure(f"{cell}: {failure}") from None
    else:
        if checking:
            row.check = runs
        else:
            row.rounds.append(runs)
        print(f"  {cell}: " + ", ".join(f"{run.name} {run.seconds:.2f} s" for run in runs), flush=True)


def _nbytes(workload: str, data: Path) -> int:
    if workload == "g":
        return SCATTERED * SCATTERED_BYTES
    shapes = Checkpoint(data / BUCKET / checkpoint_of(workload)).shapes_for(workload)
    return sum(2 * math.prod(shape) for shape in shapes.values())
