"""Report of the slow tail: figures with their aims, as a table, a chart and JSON. tail.py measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, median_high
from typing import Any, Final, NamedTuple

from cells import TITLES
from charts import ratio_chart
from measure import RUNS, Run, as_json
from pauses import PAUSES_S
from report import write_aims
from tail import LIMIT_S, Tail

__all__ = ["report_tail"]

_CONTENDERS: Final = ("mpreader", "s3torchconnector", "obstore")
_NOTES: Final = f"""\
Medians of the rounds, first / second load of a process; seconds with the tail ÷ seconds without, where nothing else is
said. s3torchconnector loads with its dcp_optimized reader; obstore knows no checkpoints, and fetches the same files.
A run of more than {LIMIT_S:.0f} s was ended, which is written as ">"; a contender whose runs all were had no further
rounds. Where all answers are slow, the limit is 60 s.
"""


class Value(NamedTuple):
    """A figure of one round, or the median of all: ``is_least`` if the true one is larger, since a run was ended."""

    value: float
    is_least: bool


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table.

    Attributes:
        key: Key of the case.
        title: Title of the row.
        most: Value up to which the aim is reached.
        of: Function of the runs with the tail and without it.
        as_share: True: it is written in per cent.
        contenders: Contenders of which it says something; empty: all.
    """

    key: str
    title: str
    most: float
    of: Callable[[Run, Run], float]
    as_share: bool = False
    contenders: tuple[str, ...] = ()

    def text(self, value: Value | float) -> str:
        """A value as it is written."""
        number, is_least = value if isinstance(value, Value) else (value, False)
        if self.as_share:
            return f"{100 * number:.2f} %"
        return f"{'> ' if is_least else ''}{number:.{0 if number >= 20 else 2}f}"


def _seconds(tail: Run, without: Run) -> float:
    return tail.seconds / without.seconds


def _extra_bytes(tail: Run, without: Run) -> float:
    return tail.served_bytes / without.served_bytes - 1 if without.served_bytes else 0.0


def _beyond_pauses(tail: Run, without: Run) -> float:
    return (tail.seconds - PAUSES_S) / without.seconds


def _cuts(tail: Run, _: Run) -> float:
    return tail.cuts / max(1, tail.requests)


FIGURES: Final = (
    Figure("1", "2 % of answers at 200 kB/s", 1.3, _seconds),
    Figure("1", "the same: bytes served beyond those without", 0.03, _extra_bytes, as_share=True),
    Figure("2", "1 % of answers wait 5 s for the first byte", 1.3, _seconds),
    Figure("3", "1 % of connections go silent after a random byte", 1.5, _seconds),
    Figure("4", "all answers at 200 kB/s: cutting ÷ not cutting", 1.02, _seconds),
    Figure("5", "the server pauses for 3 s, twice: without these 6 s", 1.3, _beyond_pauses),
    Figure("5", "the same: requests that were cut", 0.1, _cuts, as_share=True, contenders=("mpreader",)),
    Figure("6", "one of four addresses is slow (200 kB/s)", 1.3, _seconds),
    Figure("7", "one of four addresses refuses", 1.3, _seconds),
    Figure("8", "1.2 GB: first ÷ second load of a process", 1.15, _seconds),
    Figure("9", "5,000 ranges of 64 KiB: first ÷ second fetch", 1.5, _seconds),
)


def report_tail(tails: Sequence[Tail], out: Path, machine: dict[str, Any]) -> None:
    """Print the table, write ``tail.json``, ``tail.md`` and ``tail.png``."""
    table = _table(tails)
    document = {"machine": machine, "rows": _figures_json(tails), "measurements": [_tail_json(tail) for tail in tails]}
    write_aims(out / "tail", "The slow tail", [table], _NOTES, document)
    panels = [
        (figure.title, figure.most, [(name, _value(tails, figure, name, RUNS[0])) for name in _CONTENDERS])
        for figure in FIGURES if not figure.as_share
    ]  # fmt: skip
    shown = [panel for panel in panels if any(value is not None for _, value in panel[2])]
    if shown:
        title = "Times as long as without the tail, first load of a process (dotted: the aim)"
        ratio_chart(shown, title, out / "tail.png")
    print("written:", *(out / f"tail.{kind}" for kind in ("json", "md", "png")))


def _table(tails: Sequence[Tail]) -> list[list[str]]:
    table = [["", "at most", *_CONTENDERS]]
    for figure in FIGURES:
        cells = [_cell(tails, figure, name) for name in _CONTENDERS]
        if any(cells):
            table.append([figure.title, figure.text(figure.most), *cells])
    return table


def _cell(tails: Sequence[Tail], figure: Figure, name: str) -> str:
    values = [value for run in RUNS if (value := _value(tails, figure, name, run)) is not None]
    note = next((tail.note for tail in tails if tail.case.key == figure.key and _title(tail) == name), "")
    return " / ".join(map(figure.text, values)) or note


def _title(tail: Tail) -> str:
    return TITLES[tail.contender]


def _value(tails: Sequence[Tail], figure: Figure, name: str, run: str) -> Value | None:
    """Median of a figure's values in all rounds; None where there are none."""
    values = [
        value
        for tail in tails
        if tail.case.key == figure.key and _title(tail) == name and name in (figure.contenders or _CONTENDERS)
        for value in _values(tail, figure, run)
    ]
    if not values:
        return None
    if any(value.is_least for value in values):
        return median_high(values)
    return Value(median(value.value for value in values), False)


def _values(tail: Tail, figure: Figure, run: str) -> list[Value]:
    found = []
    for pair in tail.rounds:
        # Without a tail the runs of one process are compared: all that is said of them belongs to the first.
        runs = [pair.tail[:1], pair.tail[1:]] if tail.case.without is None else [pair.tail, pair.without]
        for with_tail, without in zip(*runs, strict=True):
            is_ended = with_tail.seconds >= tail.case.limit_s
            # A run without the tail that was ended has no seconds to compare with, and one that was ended no bytes.
            is_told = without.seconds < tail.case.limit_s and not (figure.as_share and is_ended)
            if with_tail.name == run and is_told:
                found.append(Value(figure.of(with_tail, without), is_ended))
    return found


def _figures_json(tails: Sequence[Tail]) -> list[dict[str, Any]]:
    records = []
    for figure in FIGURES:
        reached = {name: {run: _value(tails, figure, name, run) for run in RUNS} for name in _CONTENDERS}
        if any(value for runs in reached.values() for value in runs.values()):
            records.append({"row": figure.title, "at_most": figure.most, "reached": reached})
    return records


def _tail_json(tail: Tail) -> dict[str, Any]:
    rounds = [
        {"tail": list(map(as_json, pair.tail)), "without": list(map(as_json, pair.without))} for pair in tail.rounds
    ]
    return {"case": tail.case.title, "contender": tail.contender, "note": tail.note, "rounds": rounds}
