"""Report of the ranks of a host: figures with their aims, as tables, a chart and JSON. ranks.py measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from cells import TITLES
from charts import ratio_chart
from group import RanksRun
from measure import RUNS
from ranks import CASES, LINK_BYTES_PER_S, RANK_CONTENDERS, Ranks
from report import write_aims

__all__ = ["report_ranks"]

_NOTES: Final = f"""\
Medians of the rounds; s3fs, in torch's FsspecReader, has one. Needed: the bytes of the tensors in memory, each once,
whichever ranks have it. Served: all bodies that the server sent, .metadata for each rank included. First / second load
of the ranks' processes; the seconds are those of the slowest rank.
The link passes {LINK_BYTES_PER_S // 1_000_000} MB/s in sum.
Memory: of all ranks and their workers, targets aside, in the first load of a round of its own, in which every byte was
checked; shared memory counts once.
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table of aims.

    Attributes:
        title: Title of the row.
        most: Value up to which the aim is reached.
        of: Function of the results of one contender, which returns None where they don't tell.
        digits: Digits behind the point.
        is_drawn: True: the chart has a panel of it.
    """

    title: str
    most: float
    of: Callable[[Results], float | None]
    digits: int = 3
    is_drawn: bool = True


class Results:
    """Results of one contender, by case.

    Args:
        measured: All results.
        contender: The contender.
    """

    def __init__(self, measured: Sequence[Ranks], contender: str) -> None:
        self._measured = measured
        self._contender = contender
        self._cases = {ranks.case.key: ranks for ranks in measured if ranks.contender == contender}

    def of(self, contender: str) -> Results:
        """Those of another contender."""
        return Results(self._measured, contender)

    def seconds(self, case: str, run: str = RUNS[1]) -> float | None:
        """Seconds of a load."""
        return _median([float(one.seconds) for one in self._runs(case, run)])

    def served_per_needed(self, case: str) -> float | None:
        """Bytes that the server sent for a load ÷ bytes that the host needed."""
        ranks = self._cases.get(case)
        return _median([one.served_bytes / ranks.needed_bytes for one in self._runs(case, RUNS[1])]) if ranks else None

    def peak_mb(self, case: str) -> float | None:
        """Most memory, in MB, of the first load: before the second, bytes are compared, which leaves memory, too."""
        peaks = [run.peak_extra_bytes for run in self._check(case)[:1] if run.peak_extra_bytes is not None]
        return peaks[0] / 1e6 if peaks else None

    def shared_bytes(self, case: str) -> float | None:
        """Most shared memory of both loads."""
        peaks = [run.peak_shared_bytes for run in self._check(case) if run.peak_shared_bytes is not None]
        return float(max(peaks)) if peaks else None

    def note(self, case: str) -> str:
        """Reason for which there is nothing, or no more."""
        return self._cases[case].note if case in self._cases else ""

    def _runs(self, case: str, name: str) -> list[RanksRun]:
        rounds = self._cases[case].rounds if case in self._cases else []
        return [run for runs in rounds for run in runs if run.name == name]

    def _check(self, case: str) -> list[RanksRun]:
        return self._cases[case].check if case in self._cases else []


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _ratio(left: float | None, right: float | None) -> float | None:
    return left / right if left is not None and right else None


def _served(case: str) -> Callable[[Results], float | None]:
    return lambda results: results.served_per_needed(case)


def _peak_of_eight(results: Results) -> float | None:
    return results.peak_mb("eight")


FIGURES: Final = (
    Figure("served ÷ needed: replicated, 4 ranks", 1.01, _served("replica")),
    Figure("served ÷ needed: HSDP 2 x 2", 1.01, _served("hsdp")),
    Figure("served ÷ needed: columns, 4 ranks", 1.01, _served("columns")),
    Figure("served ÷ needed: rows, 4 ranks", 1.02, _served("rows")),
    Figure("served ÷ needed: rows, 3 → 4 ranks", 1.02, _served("3to4")),
    Figure(
        "200 MB/s: seconds of 8 ranks ÷ of 1 rank",
        1.15,
        lambda results: _ratio(results.seconds("link8"), results.seconds("link1")),
        2,
    ),
    Figure(
        "replicated, 4 ranks: seconds ÷ share_host=False",
        0.6,
        lambda results: _ratio(results.seconds("replica"), results.of("alone").seconds("replica")),
        2,
    ),
    Figure(
        "shared memory of 8 ranks ÷ of 1 rank",
        1.2,
        lambda results: _ratio(results.shared_bytes("eight"), results.shared_bytes("one")),
        2,
        is_drawn=False,
    ),
    Figure("peak memory of 8 ranks, 1.2 GB replicated, MB", 400, _peak_of_eight, 0, is_drawn=False),
)


def report_ranks(measured: Sequence[Ranks], out: Path, machine: dict[str, Any]) -> None:
    """Print the tables, write ``ranks.json``, ``ranks.md`` and ``ranks.png``."""
    results = {name: Results(measured, name) for name in RANK_CONTENDERS}
    tables = [_aims(results), _seconds(results)]
    document = {
        "machine": machine,
        "rows": [_figure_json(figure, results) for figure in FIGURES],
        "measurements": [ranks.as_json() for ranks in measured],
    }
    write_aims(out / "ranks", "Ranks of one host", tables, _NOTES, document)
    panels = [
        (
            figure.title,
            figure.most,
            [
                (TITLES[name], None if (value := figure.of(each)) is None else (value, False))
                for name, each in results.items()
            ],
        )
        for figure in FIGURES
        if figure.is_drawn
    ]
    shown = [panel for panel in panels if any(value is not None for _, value in panel[2])]
    if shown:
        ratio_chart(shown, "Ranks of one host, second load of their processes (dotted: the aim)", out / "ranks.png")
    print("written:", *(out / f"ranks.{kind}" for kind in ("json", "md", "png")))


def _aims(results: dict[str, Results]) -> list[list[str]]:
    table = [["", "at most", *(TITLES[name] for name in results)]]
    for figure in FIGURES:
        values = [figure.of(each) for each in results.values()]
        if any(value is not None for value in values):
            texts = ["" if value is None else f"{value:.{figure.digits}f}" for value in values]
            table.append([figure.title, f"{figure.most:g}", *texts])
    return table


def _seconds(results: dict[str, Results]) -> list[list[str]]:
    table = [["seconds, first / second load", *(TITLES[name] for name in results)]]
    for case in CASES:
        cells = []
        for each in results.values():
            seconds = [value for run in RUNS if (value := each.seconds(case.key, run)) is not None]
            cells.append(" / ".join(f"{value:.2f}" for value in seconds) or each.note(case.key))
        if any(cells):
            table.append([case.title, *cells])
    table.append(["peak memory, MB, targets aside", *[""] * len(results)])
    for case in CASES:
        peaks = [each.peak_mb(case.key) for each in results.values()]
        if any(peak is not None for peak in peaks):
            table.append([case.title, *("" if peak is None else f"{peak:.0f}" for peak in peaks)])
    return table


def _figure_json(figure: Figure, results: dict[str, Results]) -> dict[str, Any]:
    reached = {TITLES[name]: figure.of(each) for name, each in results.items()}
    return {"row": figure.title, "at_most": figure.most, "reached": reached}
