"""Report of loads of safetensors files: figures with their aims, tables, a chart, JSON. tensor_loads.py measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from cells import TITLES
from charts import SecondsPanel, seconds_chart
from floor import floor_sizes
from measure import RUNS, Run
from report import write_aims
from tensor_loads import TENSOR_CASES, TENSOR_CONTENDERS, TensorRuns

__all__ = ["report_tensors"]

_FLOORS: Final = ("floor", "floor-private")
_NOTES: Final = """\
Medians of the rounds; second load of a process where nothing else is said. All tensors are kept, in CPU memory that
the load takes for them, except where they are let go. Run:ai: its tensors belong to the caller by default; cloned: it
reads into buffers that it reuses (owned=False), and each tensor is cloned. It gets the names of the files, while
mpreader finds them by the index. Bare sockets: as many connections as mpreader's pool ({connections}, of {workers}
processes), which exist when the time begins, receive whole files into memory that was never touched: processes into
shared memory, threads into private; the aim is against the faster of the two.
CPU: of the process and its descendants, without the server. Bytes are those of all bodies that the server sent, headers
and index included. Memory: of the process tree in the first load of a round of its own, in which every byte was
compared; the kept tensors are taken off, shared memory counts once. Each rank keeps its quarter of the rows of every
tensor; Run:ai's ranks broadcast all tensors by gloo (RUNAI_STREAMER_DIST=1) and clone their rows; the seconds are those
of the slowest rank.
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table of aims.

    Attributes:
        title: Title of the row.
        aim: Value from which, or up to which, the aim is reached.
        of: Function of the results, which returns None where they don't tell.
        is_least: True: at least the aim is wanted. False: at most.
        digits: Digits behind the point.
    """

    title: str
    aim: float
    of: Callable[[Results], float | None]
    is_least: bool = True
    digits: int = 2

    def is_reached(self, value: float) -> bool:
        """True if a value reaches the aim."""
        return value >= self.aim if self.is_least else value <= self.aim


class Results:
    """Medians of what was measured, by case and contender."""

    def __init__(self, measured: Sequence[TensorRuns]) -> None:
        self._measured = {(runs.case.key, runs.contender): runs for runs in measured}

    def seconds(self, case: str, contender: str, run: str = RUNS[1]) -> float | None:
        """Seconds of a load; None where it was not measured."""
        return _median([one.seconds for one in self._runs(case, contender, run)])

    def ratio(self, case: str, contender: str) -> float | None:
        """Seconds of a contender ÷ seconds of mpreader."""
        return _ratio(self.seconds(case, contender), self.seconds(case, "mpreader"))

    def first_per_second(self, case: str, contender: str) -> float | None:
        """Seconds of the first load of a process ÷ seconds of its second one."""
        return _ratio(*(self.seconds(case, contender, run) for run in RUNS))

    def floor(self, case: str) -> float | None:
        """Seconds of bare sockets into that memory into which they are faster."""
        return min((found for name in _FLOORS if (found := self.seconds(case, name)) is not None), default=None)

    def cpu_s(self, case: str, contender: str) -> float | None:
        """CPU seconds of the second load, those of the server not counted; None for ranks."""
        return _median([one.cpu_s for one in self._runs(case, contender, RUNS[1]) if isinstance(one, Run)])

    def served_per_needed(self, case: str, contender: str) -> float | None:
        """Bytes that the server sent for a load ÷ bytes of what was loaded; None where they were not counted."""
        served = [one.served_bytes for one in self._runs(case, contender, RUNS[1]) if one.served_bytes]
        return _ratio(_median(served), self._measured[case, contender].needed_bytes) if served else None

    def extra_mb(self, case: str, contender: str) -> float | None:
        """Most memory of the first load beside the tensors that it keeps."""
        runs = self._measured.get((case, contender))
        peaks = [one.peak_extra_bytes for one in runs.check[:1] if one.peak_extra_bytes is not None] if runs else []
        kept = 0 if runs is None or case == "streamed" else runs.needed_bytes
        return (peaks[0] - kept) / 1e6 if peaks else None

    def note(self, case: str, contender: str) -> str:
        """Reason for which there is nothing, or no more."""
        runs = self._measured.get((case, contender))
        return runs.note if runs else ""

    def _runs(self, case: str, contender: str, name: str) -> list[Any]:
        runs = self._measured.get((case, contender))
        return [one for each in runs.rounds for one in each if one.name == name] if runs else []


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _ratio(left: float | None, right: float | None) -> float | None:
    return left / right if left is not None and right else None


FIGURES: Final = (
    Figure("1.26 GB: Run:ai, cloned ÷ mpreader", 2.2, lambda results: results.ratio("whole", "runai-clone")),
    Figure("the same: Run:ai ÷ mpreader", 2.0, lambda results: results.ratio("whole", "runai")),
    Figure(
        "90 MB/s a connection, 30 ms to the first byte: Run:ai, cloned ÷ mpreader",
        2.0,
        lambda results: results.ratio("far", "runai-clone"),
    ),
    Figure("the same: Run:ai ÷ mpreader", 2.0, lambda results: results.ratio("far", "runai")),
    Figure(
        "1.26 GB: bare sockets ÷ mpreader",
        0.85,
        lambda results: _ratio(results.floor("whole"), results.seconds("whole", "mpreader")),
    ),
    Figure("extra memory, MB", 150, lambda results: results.extra_mb("whole", "mpreader"), False, 0),
    Figure("first ÷ second load", 1.3, lambda results: results.first_per_second("whole", "mpreader"), False),
    Figure(
        "half the tensors by name: served ÷ needed",
        1.02,
        lambda results: results.served_per_needed("half", "mpreader"),
        False,
        3,
    ),
    Figure(
        "a quarter of the rows of all: served ÷ needed",
        1.05,
        lambda results: results.served_per_needed("rows", "mpreader"),
        False,
        3,
    ),
    Figure(
        "4 ranks, tensor-parallel: served ÷ needed",
        1.02,
        lambda results: results.served_per_needed("ranks", "mpreader"),
        False,
        3,
    ),
    Figure("the same: Run:ai by gloo ÷ mpreader", 1.5, lambda results: results.ratio("ranks", "runai")),
)


def report_tensors(measured: Sequence[TensorRuns], out: Path, machine: dict[str, Any]) -> None:
    """Print the tables, write ``safetensors.json``, ``safetensors.md`` and ``safetensors.png``."""
    results = Results(measured)
    contenders = [name for name in TENSOR_CONTENDERS if any(runs.contender == name for runs in measured)]
    cases = [case for case in TENSOR_CASES if any(runs.case == case for runs in measured)]
    titles = {case.key: case.title for case in cases}
    tables = [_aims(results), _seconds(results, titles, contenders), _costs(results, titles, contenders)]
    sizes = floor_sizes()
    notes = _NOTES.format(connections=sizes.workers * sizes.connections_per_worker, workers=sizes.workers)
    document = {
        "machine": machine,
        "aims": [_figure_json(figure, results) for figure in FIGURES],
        "measurements": [runs.as_json() for runs in measured],
    }
    write_aims(out / "safetensors", "safetensors files", tables, notes, document)
    panels = [_panel(results, case.key, case.title, contenders) for case in cases if len(case.contenders) > 1]
    where = f"http from the same {machine['cores']} cores; shorter is better"
    if panels:
        seconds_chart(panels, f"Seconds to load safetensors files, second load\n{where}", out / "safetensors.png")
    print("written:", *(out / f"safetensors.{kind}" for kind in ("json", "md", "png")))


def _aims(results: Results) -> list[list[str]]:
    table = [["", "aim", "reached", ""]]
    for figure in FIGURES:
        value = figure.of(results)
        if value is not None:
            aim = f"{'at least' if figure.is_least else 'at most'} {figure.aim:g}"
            table.append([figure.title, aim, f"{value:.{figure.digits}f}", "✓" if figure.is_reached(value) else "✗"])
    return table


def _seconds(results: Results, titles: dict[str, str], contenders: Sequence[str]) -> list[list[str]]:
    table = [["seconds, first / second load", *(TITLES[name] for name in contenders)]]
    for key, title in titles.items():
        cells = []
        for name in contenders:
            seconds = [found for run in RUNS if (found := results.seconds(key, name, run)) is not None]
            cells.append(" / ".join(f"{found:.2f}" for found in seconds) or results.note(key, name))
        table.append([title, *cells])
    return table


def _costs(results: Results, titles: dict[str, str], contenders: Sequence[str]) -> list[list[str]]:
    table = [["CPU seconds; served ÷ needed; extra memory, MB", *(TITLES[name] for name in contenders)]]
    for key, title in titles.items():
        table.append([title, *(_costs_of(results, key, name) for name in contenders)])
    return table


def _costs_of(results: Results, case: str, contender: str) -> str:
    values = (
        (results.cpu_s(case, contender), 2),
        (results.served_per_needed(case, contender), 3),
        (results.extra_mb(case, contender), 0),
    )
    return "; ".join(f"{value:.{digits}f}" for value, digits in values if value is not None)


def _panel(results: Results, key: str, title: str, contenders: Sequence[str]) -> SecondsPanel:
    return title, [(name, results.seconds(key, name), results.note(key, name)) for name in contenders]


def _figure_json(figure: Figure, results: Results) -> dict[str, Any]:
    return {
        "row": figure.title,
        "aim": figure.aim,
        "is_least": figure.is_least,
        "reached": figure.of(results),
    }
