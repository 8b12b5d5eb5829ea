"""Results: all measurements, and the ratios and goals that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from cells import Cell
from measure import RUNS, Run

__all__ = ["GOALS", "Goal", "Results", "Row"]

Metric = Callable[["Row", str], float | None]


@dataclass(slots=True)
class Row:
    """All runs of one cell.

    Attributes:
        cell: The cell.
        nbytes: Bytes that it delivers.
        rounds: Timed runs of each round: the first one of the process, and the one again.
        check: Runs of the round in which bytes were compared and memory was sampled.
        note: Reason, in words, for which nothing was measured; empty if something was.
    """

    cell: Cell
    nbytes: int
    rounds: list[list[Run]] = field(default_factory=list)
    check: list[Run] = field(default_factory=list)
    note: str = ""

    def seconds(self, run: str) -> float | None:
        """Median wall time."""
        return self._median(run, lambda one: one.seconds)

    def cpu_per_gb(self, run: str) -> float | None:
        """Median CPU seconds for 10⁹ bytes."""
        return self._median(run, lambda one: one.cpu_s / self.nbytes * 1e9)

    def requests(self, run: str) -> float | None:
        """Median number of requests."""
        return self._median(run, lambda one: one.requests)

    def peak(self, run: str) -> float | None:
        """Peak of the extra memory, in bytes."""
        return self.check[RUNS.index(run)].peak_extra_bytes if self.check else None

    def _median(self, run: str, value: Callable[[Run], float]) -> float | None:
        index = RUNS.index(run)
        return median(value(runs[index]) for runs in self.rounds) if self.rounds else None


class Results:
    """The rows, in the order of the table."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self._by_cell = {row.cell: row for row in rows}

    def find(self, cell: Cell) -> Row | None:
        """The row of a cell, None if it was not run."""
        return self._by_cell.get(cell)

    def ratio(self, row: Row, run: str) -> float | None:
        """Seconds of a row, divided by those of mpreader in the same group; None if one of them was not measured."""
        ours = self.find(Cell(*row.cell.group, "mpreader"))
        return _quotient(row.seconds(run), ours.seconds(run) if ours is not None else None)


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio that is to be reached: ``metric`` of ``over`` divided by that of ``under``.

    Attributes:
        title: Title in the table.
        least: Ratio from which on the goal is reached.
        over: Cell of the numerator.
        under: Cell of the denominator.
        metric: Function of a row and the name of a run.
    """

    title: str
    least: float
    over: Cell
    under: Cell
    metric: Metric = Row.seconds

    def reached(self, results: Results, run: str) -> float | None:
        """The ratio, None where it was not measured."""
        over, under = (results.find(cell) for cell in (self.over, self.under))
        if over is None or under is None:
            return None
        return _quotient(self.metric(over, run), self.metric(under, run))


def _against_mpreader(
    title: str, least: float, place: tuple[str, str, str], contender: str, metric: Metric = Row.seconds
) -> Goal:
    return Goal(title, least, Cell(*place, contender), Cell(*place, "mpreader"), metric)


_A: Final = ("a", "plain", "touched")
_TORCH: Final = "dcp_optimized"
GOALS: Final = (
    _against_mpreader("a, plain, touched", 3.5, _A, _TORCH),
    _against_mpreader("a, plain, fresh", 3.2, ("a", "plain", "fresh"), _TORCH),
    _against_mpreader("a, tls, touched", 2.2, ("a", "tls", "touched"), _TORCH),
    _against_mpreader("b, plain, touched", 3.3, ("b", "plain", "touched"), _TORCH),
    Goal("a, plain, touched, through the drop-in", 2.2, Cell(*_A, _TORCH), Cell(*_A, "drop-in")),
    _against_mpreader("a, plain, touched: CPU per GB", 3.5, _A, _TORCH, Row.cpu_per_gb),
    _against_mpreader("a, plain, touched: peak extra memory", 6.0, _A, _TORCH, Row.peak),
    _against_mpreader("d, plain, touched: peak extra memory", 6.0, ("d", "plain", "touched"), _TORCH, Row.peak),
    _against_mpreader("a, plain, touched: torch FileSystemReader ÷ mpreader", 1.0, _A, "local"),
    _against_mpreader("b, plain, touched: torch FileSystemReader ÷ mpreader", 2.8, ("b", *_A[1:]), "local"),
    _against_mpreader("e, whole objects kept: obstore ÷ mpreader", 1.1, ("e", "plain", "-"), "obstore"),
    _against_mpreader("e, whole objects kept", 3.5, ("e", "plain", "-"), "s3torchconnector"),
    _against_mpreader("f, streamed: obstore ÷ mpreader", 1.0, ("f", "plain", "-"), "obstore"),
    _against_mpreader("f, streamed: floor ÷ mpreader", 0.85, ("f", "plain", "-"), "floor"),
    _against_mpreader("g, scattered ranges: obstore ÷ mpreader", 1.0, ("g", "plain", "-"), "obstore"),
    Goal("a, touched: mpreader plain ÷ slow90", 0.9, Cell(*_A, "mpreader"), Cell("a", "slow90", "touched", "mpreader")),
)
