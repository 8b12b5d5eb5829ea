"""Picture of a timeline: a row for each connection, and below them the rate of all of them together.

A saved timeline (:mod:`mpreader.telemetry.timeline`) calls :func:`write_picture`. It is drawn by matplotlib, which is
optional, and imported only when a picture is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import IO, TYPE_CHECKING, Final

from mpreader.telemetry.events import RequestEvent
from mpreader.telemetry.rows import Rows, first_start_s, worker_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_picture"]

_WAITING, _RECEIVING, _FAILED, _CUT = "waiting for the first byte", "receiving", "failed", "slow, cut"
_COLORS: Final = {_WAITING: "#f2b134", _RECEIVING: "#2a7fbf", _FAILED: "#c8352b", _CUT: "#8e5ea2"}
_WIDTH_IN: Final = 12.0  # all sizes are in inches, as matplotlib's
_ROW_IN: Final = 0.22  # one row, unless all of them would be higher than _MOST_ROWS_IN
_LEAST_ROWS_IN: Final = 1.2
_MOST_ROWS_IN: Final = 10.0
_RATE_IN: Final = 1.6  # the plot of the rate
_FRAME_IN: Final = 1.4  # title, legend and labels of the axes
_DPI: Final = 150
_BINS: Final = 120  # intervals of time for which the rate is computed
_LEAST_NUMBERED_IN: Final = 0.12  # in thinner rows the numbers of the connections would overlap


def write_picture(rows: Rows, file: IO[bytes]) -> None:
    """Write the rows as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = list(chain.from_iterable(rows.values()))
    row_in = min(_ROW_IN, _MOST_ROWS_IN / max(1, len(rows)))
    rows_in = max(_LEAST_ROWS_IN, row_in * len(rows))
    # Not pyplot, which keeps every figure in memory, and chooses a backend for the whole program.
    figure = Figure((_WIDTH_IN, rows_in + _RATE_IN + _FRAME_IN), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[rows_in, _RATE_IN])
    began_s = first_start_s(rows)
    _draw_requests(upper, rows, began_s)
    _label_rows(upper, rows, are_numbered=row_in >= _LEAST_NUMBERED_IN)
    _draw_rate(lower, events, began_s)
    figure.suptitle(_title(events), fontsize=11)
    figure.savefig(file, format="png", dpi=_DPI)


def _title(events: Sequence[RequestEvent]) -> str:
    if not events:
        return "no requests"
    seconds = max(event.ended_s for event in events) - min(event.started_s for event in events)
    received = sum(event.received for event in events)
    cut = sum(event.outcome == "slow" for event in events)
    failed = sum(event.outcome != "ok" for event in events) - cut
    rate = f": {received / seconds / 1e9:.3g} GB/s" if seconds else ""
    requests = f"{len(events):,} request{'s' * (len(events) != 1)} ({failed:,} failed{f', {cut:,} cut' if cut else ''})"
    return f"{received / 1e6:,.1f} MB in {requests} in {seconds:.2f} s{rate}"


def _draw_requests(axes: Axes, rows: Rows, began_s: float) -> None:
    from matplotlib.patches import Patch

    for place, events in enumerate(rows.values()):
        bars: dict[str, list[tuple[float, float]]] = {label: [] for label in _COLORS}
        for event in events:
            if event.outcome != "ok":
                bars[_CUT if event.outcome == "slow" else _FAILED].append(
                    (event.started_s - began_s, event.ended_s - event.started_s)
                )
                continue
            bars[_WAITING].append((event.started_s - began_s, event.first_byte_s - event.started_s))
            bars[_RECEIVING].append((event.first_byte_s - began_s, event.ended_s - event.first_byte_s))
        for label, color in _COLORS.items():
            # Where many requests share a pixel, it has the mean of their colours. An edge keeps failures visible there.
            edge = 1.0 if label in (_FAILED, _CUT) else 0.0
            axes.broken_barh(bars[label], (place - 0.4, 0.8), color=color, linewidth=edge, snap=False)
    if not rows:
        axes.text(0.5, 0.5, "no requests were recorded", transform=axes.transAxes, ha="center", va="center")
    patches = [Patch(color=color, label=label) for label, color in _COLORS.items()]
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(patches), frameon=False)


def _label_rows(axes: Axes, rows: Rows, *, are_numbered: bool) -> None:
    places: dict[tuple[int, int], list[int]] = {}
    for place, connection in enumerate(rows):
        places.setdefault(connection[:2], []).append(place)
    # A line separates two workers. A worker's name is in the middle of its rows; minor ticks number its connections.
    for own in list(places.values())[1:]:
        axes.axhline(own[0] - 0.5, color="black", linewidth=0.6)
    middles = [(own[0] + own[-1]) / 2 for own in places.values()]
    axes.set_yticks(middles, list(worker_names(rows).values()))
    if are_numbered:
        axes.set_yticks(range(len(rows)), [str(row.connection) for row in rows], minor=True, fontsize=7)
    axes.tick_params(axis="y", which="both", length=0)
    axes.tick_params(axis="y", which="major", pad=16 if are_numbered else 4)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)  # from high to low: the first row is on top
    axes.set_ylabel("connections")


def _draw_rate(axes: Axes, events: Sequence[RequestEvent], began_s: float) -> None:
    """Draw the bytes per second, those of a request spread evenly over the time of its receiving."""
    import numpy as np

    end_s = max((event.ended_s for event in events), default=began_s) - began_s
    edges = np.linspace(0.0, end_s or 1.0, _BINS + 1)
    # Bytes that all requests together had received at each edge; the differences between edges give the rate.
    total = np.zeros(len(edges))
    for event in events:
        if event.received:
            # np.interp needs growing times, but a small part may begin and end at the same tick of the clock.
            times_s = (event.first_byte_s - began_s, max(event.ended_s, event.first_byte_s + 1e-9) - began_s)
            total += np.interp(edges, times_s, (0.0, event.received))
    axes.stairs(np.diff(total) / np.diff(edges) / 1e9, edges, fill=True, color=_COLORS[_RECEIVING])
    axes.set_xlim(0.0, 1.01 * edges[-1])  # a margin, so that the last request is not cut
    axes.set_ylim(bottom=0.0, top=None if events else 1.0)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylabel("GB/s received")
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
