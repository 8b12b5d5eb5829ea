"""Charts of the results, for the README: a panel for each workload, a bar for each contender."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from cells import TITLES
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import Results, Row

__all__ = ["SecondsPanel", "memory_chart", "ratio_chart", "seconds_chart", "write_charts"]

mpl.use("Agg")  # draws into files, and needs no display
_WIDTH_IN: Final = 9.0
_DPI: Final = 150
_OURS: Final = "#1f6fb2"
_OTHERS: Final = "#9aa5b1"
_TEXT: Final = "#333333"
_LINES: Final = ("#1f6fb2", "#e08214", "#6b7785")
_RATIO_COLUMNS: Final = 3
# Title, aim, and for each contender its value and whether the true one is larger.
RatioRow = tuple[str, float, Sequence[tuple[str, "tuple[float, bool] | None"]]]
# Title, and for each contender its name, its seconds, and why there are none.
SecondsPanel = tuple[str, Sequence[tuple[str, "float | None", str]]]
_PANELS: Final = {
    "a": "1.2 GB, 109 tensors",
    "b": "10,000 of 16 KiB",
    "c": "half of the 1.2 GB",
    "d": "one tensor of 2 GB",
    "e": "whole objects, kept",
    "f": "whole objects, let go",
    "g": "5,000 of 64 KiB",
}


def write_charts(results: Results, folder: Path, where: str) -> list[Path]:
    """Write the charts for which there are results; returns their files."""
    files = []
    for name, workloads, targets, title, value, unit in _charts():
        rows = {key: [row for row in results.rows if row.cell.group == (key, "plain", targets)] for key in workloads}
        # A run of chosen cells has no results for some workloads, or for none of a chart.
        shown = {key: members for key, members in rows.items() if any(value(row) for row in members)}
        if shown:
            files.append(folder / f"{name}.png")
            _panels(shown, value, unit, f"{title}\n{where}").savefig(files[-1], dpi=_DPI)
    return files


def _charts() -> Iterator[tuple[str, str, str, str, Callable[[Row], float | None], str]]:
    """For each chart: name of its file, workloads, targets, title, function of a row that gives the value, unit."""
    yield "loads", "abcd", "touched", "Seconds to load a checkpoint, second load of a process", _again, "s"
    yield "loads-first", "abcd", "touched", "Seconds to load a checkpoint, first load of a process", _first, "s"
    yield "memory", "abcd", "touched", "Peak memory besides the tensors, first load of a process", _peak_mb, "MB"
    yield "fetches", "efg", "-", "Seconds to fetch, with a warm client", _again, "s"


def _again(row: Row) -> float | None:
    return row.seconds("again")


def _first(row: Row) -> float | None:
    return row.seconds("first")


def _peak_mb(row: Row) -> float | None:
    peak = row.peak("first")
    return None if peak is None else peak / 1e6


def _panels(rows: Mapping[str, Sequence[Row]], value: Callable[[Row], float | None], unit: str, title: str) -> Figure:
    # All panels have a bar, or a free place, for each contender, in the same order.
    names = list(dict.fromkeys(row.cell.contender for members in rows.values() for row in members))
    figure = Figure(figsize=(_WIDTH_IN, 1.1 + 0.32 * len(names)), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=10, color=_TEXT)
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for panel, (workload, members) in zip(panels, rows.items(), strict=True):
        by_name = {row.cell.contender: row for row in members}
        _bars(panel, [(name, by_name.get(name)) for name in names], value)
        panel.set_title(f"{_PANELS[workload]} ({unit})", fontsize=9, color=_TEXT)
    panels[0].set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=9, color=_TEXT)
    panels[0].invert_yaxis()  # the first contender on top; the axis is shared by all panels
    return figure


def _bars(panel: Axes, rows: Sequence[tuple[str, Row | None]], value: Callable[[Row], float | None]) -> None:
    _lengths(panel, [(name, *((value(row), row.note) if row is not None else (None, ""))) for name, row in rows])


def _lengths(panel: Axes, rows: Sequence[tuple[str, float | None, str]]) -> None:
    longest = max(length or 0 for _, length, _ in rows)
    for position, (name, length, note) in enumerate(rows):
        if length is not None:
            panel.barh(position, length, height=0.65, color=_OURS if name in ("mpreader", "drop-in") else _OTHERS)
            text = f" {length:.0f}" if length >= 20 else f" {length:.2f}"
        else:
            text = f" {note}"
        panel.text(length or 0, position, text, va="center", fontsize=8, color=_TEXT)
    panel.set_xlim(0, longest * 1.3 or 1)  # room for the number behind the longest bar
    _strip(panel)


def memory_chart(series: Mapping[str, Sequence[tuple[float, int]]], title: str, file: Path) -> None:
    """Memory over time, a line for each name."""
    figure = Figure(figsize=(_WIDTH_IN, 3.4), layout="constrained", facecolor="white")
    panel: Any = figure.subplots()
    for (name, samples), color in zip(series.items(), _LINES, strict=False):
        panel.plot([at for at, _ in samples], [extra / 1e6 for _, extra in samples], color=color, label=name)
    panel.set_title(title, fontsize=10, color=_TEXT)
    panel.set_xlabel("seconds", fontsize=9, color=_TEXT)
    panel.set_ylabel("MB besides the tensors", fontsize=9, color=_TEXT)
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", color="#e5e5e5")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=_DPI)


def seconds_chart(rows: Sequence[SecondsPanel], title: str, file: Path) -> None:
    """A panel of bars for each workload, with a place for each contender, in the same order."""
    names = [name for name, _, _ in rows[0][1]]
    lines = -(-len(rows) // _RATIO_COLUMNS)
    height = 0.7 + lines * (0.55 + 0.22 * len(names))
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=10, color=_TEXT)
    panels = figure.subplots(lines, min(len(rows), _RATIO_COLUMNS), sharey=True, squeeze=False).flat
    for (name_of_row, lengths), panel in zip(rows, panels, strict=False):
        _lengths(panel, lengths)
        panel.set_title("\n".join(textwrap.wrap(name_of_row, 34)), fontsize=8, color=_TEXT)
        panel.set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=8, color=_TEXT)
    for panel in list(panels):  # places without a row
        panel.axis("off")
    figure.axes[0].invert_yaxis()  # the first contender on top; the axis is shared by all panels
    figure.savefig(file, dpi=_DPI)


def ratio_chart(rows: Sequence[RatioRow], title: str, file: Path) -> None:
    """A panel for each ratio, with a bar for each contender and a line at the aim."""
    height = -(-len(rows) // _RATIO_COLUMNS)
    figure = Figure(figsize=(_WIDTH_IN, 0.5 + 1.2 * height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=10, color=_TEXT)
    panels = figure.subplots(height, _RATIO_COLUMNS, sharey=True, squeeze=False).flat
    for (name_of_row, most, values), panel in zip(rows, panels, strict=False):
        for position, (name, value) in enumerate(values):
            _ratio_bar(panel, position, name, value)
        panel.axvline(most, color=_TEXT, linestyle=":", linewidth=1)
        panel.set_title("\n".join(textwrap.wrap(name_of_row, 34)), fontsize=8, color=_TEXT)
        panel.set_yticks(range(len(values)), [name for name, _ in values], fontsize=8, color=_TEXT)
        panel.set_xlim(0, max(most, *(value[0] for _, value in values if value is not None)) * 1.35)
        _strip(panel)
    for panel in list(panels):  # places without a row
        panel.axis("off")
    figure.axes[0].invert_yaxis()  # the first contender on top; the axis is shared by all panels
    figure.savefig(file, dpi=_DPI)


def _ratio_bar(panel: Axes, position: int, name: str, value: tuple[float, bool] | None) -> None:
    length, is_least = value or (0.0, False)
    panel.barh(position, length, height=0.65, color=_OURS if name == "mpreader" else _OTHERS)
    digits = 0 if length >= 20 else 2
    text = f" {'> ' if is_least else ''}{length:.{digits}f}" if value else ""
    panel.text(length, position, text, va="center", fontsize=8, color=_TEXT)


def _strip(panel: Axes) -> None:
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
