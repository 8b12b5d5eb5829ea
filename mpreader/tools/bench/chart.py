"""Chart of a sweep: a panel for each setting that was swept, a bar for each of its values.

It imports matplotlib, which is optional, and is therefore imported by ``mpreader bench --chart`` only. It measures
nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpreader.config import format_bytes
from mpreader.tools.bench.measurement import Settings
from mpreader.tools.bench.sweep import AXES, AxisResults, Sweep, median_rate

__all__ = ["draw_sweep", "save_chart"]

_BAR_IN: Final = 0.8  # sizes are in inches, as matplotlib's
_LEAST_BARS: Final = 9  # a narrower figure has no room for the headline
_HEIGHT_IN: Final = 4.2
_DPI: Final = 150
_LONGEST_SOURCE: Final = 80  # characters; of a longer name the middle is left out
_CHOSEN: Final = "#1f6fb2"
_OTHER: Final = "#b8c2cc"
_DEFAULTS: Final = "#e08214"
_TEXT: Final = "#333333"
_TITLES: Final = {"workers": "workers", "connections_per_worker": "connections per worker", "part_size": "part size"}


def save_chart(sweep: Sweep, file: str | os.PathLike[str]) -> None:
    """Draw a sweep into a PNG file.

    Raises:
        OSError: The file can't be written.
    """
    figure = draw_sweep(sweep)
    FigureCanvasAgg(figure)  # not pyplot, which would choose a backend for the whole program
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a key may have letters that the font does not have
        figure.savefig(file, format="png", dpi=_DPI)


def draw_sweep(sweep: Sweep) -> Figure:
    """Draw a sweep.

    A bar is the median rate of a value, its whiskers reach from the lowest to the highest rate. Recommended values have
    a colour of their own, and a dashed line is the rate of the defaults.
    """
    counts = [len(axis_results.results) for axis_results in sweep.axes.values()]
    # Each panel needs the width of its bars, and about one more for its margins.
    width_in = _BAR_IN * max(_LEAST_BARS, sum(counts) + len(counts))
    figure = Figure(figsize=(width_in, _HEIGHT_IN), layout="constrained", facecolor="white")
    panels: Sequence[Any] = figure.subplots(1, len(counts), sharey=True, squeeze=False, width_ratios=counts)[0]
    highest = 0.0
    for panel, (axis, shown) in zip(panels, sweep.axes.items(), strict=True):
        _draw_bars(panel, shown, [getattr(key, axis) == getattr(sweep.recommended, axis) for key in shown.results])
        _draw_frame(panel, shown, axis)
        highest = max(highest, *(each.gb_per_s for measurements in shown.results.values() for each in measurements))
    panels[0].set_ylim(0, highest * 1.12 or 1)  # room for the numbers above the highest bar
    panels[0].set_ylabel("GB/s", fontsize=9, color=_TEXT)
    figure.suptitle(_headline(sweep), fontsize=10, color=_TEXT, parse_math=False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return figure


def _draw_bars(panel: Any, shown: AxisResults, chosen: Sequence[bool]) -> None:
    rates = [[each.gb_per_s for each in measurements] for measurements in shown.results.values()]
    medians = [median_rate(measurements) for measurements in shown.results.values()]
    # Two calls, even if one of them draws nothing: the legend takes its entries from the first panel.
    for group, color, label in ((True, _CHOSEN, "recommended"), (False, _OTHER, "other values")):
        places = [place for place, is_chosen in enumerate(chosen) if is_chosen is group]
        panel.bar(places, [medians[place] for place in places], width=0.62, color=color, label=label)
    # matplotlib takes the whiskers as distances from the bar's end, those below it first.
    panel.errorbar(
        range(len(medians)),
        medians,
        [
            [median - min(values) for median, values in zip(medians, rates, strict=True)],
            [max(values) - median for median, values in zip(medians, rates, strict=True)],
        ],
        fmt="none",
        ecolor=_TEXT,
        elinewidth=1,
        capsize=3,
        label="least and most",
    )
    for place, (median, values) in enumerate(zip(medians, rates, strict=True)):
        style: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "color": _TEXT}
        style["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # else the lines would cross the number
        panel.annotate(f"{median:.3g}", (place, max(values)), fontsize=8, **style)


def _draw_frame(panel: Any, shown: AxisResults, axis: str) -> None:
    settings = list(shown.results)
    label = "defaults, measured together with these"
    panel.axhline(median_rate(shown.defaults), color=_DEFAULTS, ls="--", lw=1.2, label=label)
    panel.set_xticks(range(len(settings)), [_value(axis, key) for key in settings], color=_TEXT)
    panel.set_xlim(-0.6, len(settings) - 0.4)
    panel.set_title(_title(axis, settings[0]), fontsize=9, color=_TEXT)
    panel.tick_params(length=0, labelsize=8, labelcolor=_TEXT)
    panel.grid(axis="y", color="#e5e5e5")
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)


def _headline(sweep: Sweep) -> str:
    source, best = sweep.source, sweep.recommended
    if len(source) > _LONGEST_SOURCE:
        source = f"{source[: _LONGEST_SOURCE // 2]}…{source[-_LONGEST_SOURCE // 2 :]}"
    # Rates of the final round: those of different rounds are not compared.
    rate, usual = (median_rate(sweep.final_round[settings]) for settings in (best, sweep.defaults))
    return f"{source}\nrecommended: {', '.join(_words(best).values())}: {rate:.3g} GB/s; the defaults then: {usual:.3g}"


def _title(axis: str, settings: Settings) -> str:
    """Title of a panel: its axis, and below it the values that the other axes had in all of its bars."""
    others = _words(settings)
    return f"{_TITLES[axis]}\n{', '.join(others[other] for other in AXES if other != axis)}"


def _words(settings: Settings) -> dict[str, str]:
    """Settings in words, by the names of ``AXES``."""
    workers, connections, part_size = settings.workers, settings.connections_per_worker, settings.part_size
    return {
        "workers": f"{workers} worker{'s' * (workers != 1)}",
        "connections_per_worker": f"{connections} connection{'s' * (connections != 1)} each",
        "part_size": f"{format_bytes(part_size)} parts",
    }


def _value(axis: str, settings: Settings) -> str:
    value: int = getattr(settings, axis)
    return format_bytes(value) if axis == "part_size" else str(value)
