"""A picture of requests over time: a line for each connection, and below them the rate of all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mpreader.pool.observer import RequestEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_picture"]

_WAITING: Final = "#f2b134"
_RECEIVING: Final = "#2a7fbf"
_FAILED: Final = "#c8352b"
_WIDTH_INCHES: Final = 12.0
_RATE_INCHES: Final = 1.6
_BINS: Final = 100
_Bar = tuple[float, float]


def write_picture(events: Sequence[RequestEvent], file: IO[bytes]) -> None:
    """Draw them, and write a PNG."""
    lanes = sorted({(event.worker, event.connection) for event in events})
    lanes_inches = max(1.2, min(0.22, 10 / (len(lanes) or 1)) * len(lanes))
    # Not pyplot: it keeps figures, and chooses a backend for the whole program.
    figure = Figure(figsize=(_WIDTH_INCHES, lanes_inches + _RATE_INCHES + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[lanes_inches, _RATE_INCHES])
    began_s = min((event.started_s for event in events), default=0.0)
    _draw_lanes(upper, events, lanes, began_s)
    _draw_rate(lower, events, began_s)
    figure.suptitle(_title(events))
    figure.savefig(file, format="png", dpi=100)


def _title(events: Sequence[RequestEvent]) -> str:
    if not events:
        return "no requests"
    seconds = max(event.ended_s for event in events) - min(event.started_s for event in events)
    received = sum(event.received for event in events)
    failed = sum(event.outcome != "ok" for event in events)
    rate = f" ({received / seconds / 1e9:.2f} GB/s)" if seconds else ""
    return f"{received / 1e6:,.0f} MB in {len(events):,} requests, {failed:,} failed, in {seconds:.2f} s{rate}"


def _draw_lanes(axes: Axes, events: Sequence[RequestEvent], lanes: Sequence[tuple[int, int]], began_s: float) -> None:
    for place, lane in enumerate(lanes):
        own = [event for event in events if (event.worker, event.connection) == lane]
        good = [event for event in own if event.outcome == "ok"]
        waits = [(event.started_s - began_s, event.first_byte_s - event.started_s) for event in good]
        receives = [(event.first_byte_s - began_s, event.ended_s - event.first_byte_s) for event in good]
        failures = [(event.started_s - began_s, event.ended_s - event.started_s) for event in own if event not in good]
        for bars, color in ((waits, _WAITING), (receives, _RECEIVING), (failures, _FAILED)):
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3)
    workers = sorted({worker for worker, _ in lanes})
    firsts = [min(place for place, lane in enumerate(lanes) if lane[0] == worker) for worker in workers]
    for first in firsts[1:]:
        axes.axhline(first - 0.5, color="black", linewidth=0.6)
    axes.set_yticks([first - 0.5 for first in firsts], [f"worker {worker}" for worker in workers], va="top")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(len(lanes), 1) - 0.5, -0.5)
    axes.set_ylabel("connections")
    axes.legend(
        handles=[
            Patch(color=_WAITING, label="waiting for the first byte"),
            Patch(color=_RECEIVING, label="receiving"),
            Patch(color=_FAILED, label="failed"),
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
    )


def _draw_rate(axes: Axes, events: Sequence[RequestEvent], began_s: float) -> None:
    """The bytes of a request are spread evenly over the time of its receiving."""
    end_s = max((event.ended_s for event in events), default=began_s) - began_s
    edges = np.linspace(0.0, end_s or 1.0, _BINS + 1)
    # What all had received at each edge; its slope is the rate.
    total = np.zeros(len(edges))
    for event in events:
        times = (event.first_byte_s - began_s, max(event.ended_s, event.first_byte_s + 1e-6) - began_s)
        total += np.interp(edges, times, (0.0, event.received))
    rates = np.diff(total) / np.diff(edges) / 1e9
    axes.stairs(rates, edges, fill=True, color=_RECEIVING)
    axes.set_xlim(0.0, edges[-1])
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("GB/s")
    axes.grid(axis="y", linewidth=0.4)
