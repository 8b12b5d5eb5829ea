"""What each connection did when: recorded while a program runs, saved as a picture or as a Chrome trace.

::

    with record_timeline() as timeline:
        dcp.load(state, storage_reader=reader)
    timeline.save("load.png")
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

from mpreader.errors import ConfigError
from mpreader.files import whole_file
from mpreader.telemetry.events import RequestEvent, add_observer, remove_observer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Timeline", "check_timeline_path", "record_timeline", "timeline_to"]

_WAITING, _RECEIVING, _FAILED = "waiting for the first byte", "receiving", "failed"
_COLORS: Final = {_WAITING: "#f2b134", _RECEIVING: "#2a7fbf", _FAILED: "#c8352b"}
_WIDTH_IN: Final = 12.0
_LANE_IN: Final = 0.22
_LEAST_LANES_IN: Final = 1.2
_MOST_LANES_IN: Final = 10.0
_RATE_IN: Final = 1.6
_FRAME_IN: Final = 1.4
_DPI: Final = 150
_BINS: Final = 120
# Numbers of connections would run into each other where lanes are thinner.
_LEAST_NUMBERED_IN: Final = 0.12


class Timeline:
    """The requests that ended while it was recorded. Thread-safe."""

    def __init__(self) -> None:
        # With the thread that told of it, which is the pool's own: workers of two pools have the same numbers.
        self._noted: list[tuple[int, RequestEvent]] = []

    @property
    def events(self) -> tuple[RequestEvent, ...]:
        """One for each request, in the order in which they ended."""
        return tuple(event for _, event in tuple(self._noted))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; one that is there is replaced when the new one is whole.

        Args:
            path: ``.png``: a picture, a line for each connection. ``.json``: a Chrome trace, for chrome://tracing or
                https://ui.perfetto.dev.

        Raises:
            ConfigError: As for :func:`check_timeline_path`.
            OSError: It can't be written.
        """
        write = _writer(path)
        with whole_file(path) as file:
            write(_lanes(tuple(self._noted)), file)

    def _note(self, event: RequestEvent) -> None:
        self._noted.append((threading.get_ident(), event))

    def __repr__(self) -> str:
        return f"Timeline({len(self._noted)} requests)"


@contextmanager
def record_timeline() -> Iterator[Timeline]:
    """Record the requests of all worker pools of this process while the block runs."""
    timeline = Timeline()
    note = timeline._note
    add_observer(note)
    try:
        yield timeline
    finally:
        remove_observer(note)


@contextmanager
def timeline_to(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Record while the block runs, and save it at its end, also if it fails. None: do neither.

    Raises:
        ConfigError: As for :func:`check_timeline_path`, before the block runs.
        OSError: The file can't be written.
    """
    if path is None:
        yield
        return
    check_timeline_path(path)
    with record_timeline() as timeline:
        try:
            yield
        finally:
            timeline.save(path)


def check_timeline_path(path: str | os.PathLike[str]) -> None:
    """Find out whether a timeline can be saved to ``path``, before the work that it is to show.

    Raises:
        ConfigError: The name ends neither in ``.png`` nor in ``.json``; or it is a folder's, or in none that exists
            and may be written to; or a picture is wanted, and matplotlib is not installed.
    """
    _writer(path)


class _Lane(NamedTuple):
    """A connection; ``pool`` tells pools apart that worked at the same time."""

    pool: int
    worker: int
    connection: int


_Lanes = Mapping[_Lane, Sequence[RequestEvent]]


def _writer(path: str | os.PathLike[str]) -> Callable[[_Lanes, IO[bytes]], None]:
    final = Path(path)
    suffix = final.suffix.lower()
    if suffix not in (".png", ".json"):
        raise ConfigError(f"{final}: a timeline is saved as .png (a picture) or .json (a Chrome trace)")
    if not final.parent.is_dir():
        raise ConfigError(f"{final}: there is no folder {str(final.parent)!r}")
    if final.is_dir() or not os.access(final.parent, os.W_OK):
        raise ConfigError(f"{final}: this can't be written: it is a folder, or in one that is read-only")
    if suffix == ".json":
        return _write_trace
    if find_spec("matplotlib") is None:
        raise ConfigError("a timeline as .png needs matplotlib: pip install 'mpreader[plot]', or save it as .json")
    return _write_picture


def _lanes(noted: Sequence[tuple[int, RequestEvent]]) -> _Lanes:
    """The requests of each connection; connections in order."""
    pools = _number_pools(noted)
    lanes: dict[_Lane, list[RequestEvent]] = {}
    for thread, event in noted:
        lanes.setdefault(_Lane(pools[thread], event.worker, event.connection), []).append(event)
    return {lane: lanes[lane] for lane in sorted(lanes)}


def _number_pools(noted: Sequence[tuple[int, RequestEvent]]) -> dict[int, int]:
    """A number for each thread, from 0; those that worked one after the other share it, as when a pool began anew."""
    spans: dict[int, tuple[float, float]] = {}
    for thread, event in noted:
        began_s, ended_s = spans.get(thread, (event.started_s, event.ended_s))
        spans[thread] = min(began_s, event.started_s), max(ended_s, event.ended_s)
    numbers: dict[int, int] = {}
    busy_until_s: list[float] = []
    for thread, (began_s, ended_s) in sorted(spans.items(), key=lambda item: item[1]):
        free = (number for number, until_s in enumerate(busy_until_s) if until_s <= began_s)
        numbers[thread] = number = next(free, len(busy_until_s))
        busy_until_s[number : number + 1] = [ended_s]
    return numbers


def _worker_names(lanes: _Lanes) -> dict[tuple[int, int], str]:
    """By pool and worker; the pool is named where there are several."""
    has_pools = any(lane.pool for lane in lanes)
    return {lane[:2]: (f"pool {lane.pool}, " if has_pools else "") + f"worker {lane.worker}" for lane in lanes}


def _began_s(lanes: _Lanes) -> float:
    return min((event.started_s for event in chain.from_iterable(lanes.values())), default=0.0)


def _write_trace(lanes: _Lanes, file: IO[bytes]) -> None:
    """Chrome's trace event format: a process for each worker, a thread for each connection."""
    began_s = _began_s(lanes)
    names = _worker_names(lanes)
    pids = {worker: pid for pid, worker in enumerate(names, 1)}
    trace = [_name("process_name", name, pids[worker], 0) for worker, name in names.items()]
    # Perfetto takes a thread with the number of its process for the main thread, and 0 for an idle processor.
    for tid, (lane, events) in enumerate(lanes.items(), len(pids) + 1):
        place = {"pid": pids[lane[:2]], "tid": tid}
        trace.append(_name("thread_name", f"connection {lane.connection}", **place))
        trace += (place | part for event in events for part in _slices(event, began_s))
    document = {"traceEvents": trace, "displayTimeUnit": "ms"}
    file.write(json.dumps(document, separators=(",", ":")).encode())


def _name(what: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _slices(event: RequestEvent, began_s: float) -> Iterator[dict[str, Any]]:
    """The request, and within it the wait for its first byte and, if there was one, the receiving."""
    # Whole nanoseconds: parts of fractions would stick out of the whole.
    started, answered, ended = (
        round((time_s - began_s) * 1e9) for time_s in (event.started_s, event.first_byte_s, event.ended_s)
    )
    facts = event._asdict()
    arguments = {key: facts[key] for key in ("uri", "start", "end", "received", "outcome", "attempt")}
    prefix = "" if event.outcome == "ok" else f"{event.outcome} "
    yield _slice(f"{prefix}{event.start}-{event.end}", event.outcome, started, ended, arguments)
    yield _slice("wait for the first byte", event.outcome, started, answered, {})
    if answered < ended:
        yield _slice("receive", event.outcome, answered, ended, {})


def _slice(name: str, category: str, start_ns: int, end_ns: int, arguments: dict[str, Any]) -> dict[str, Any]:
    span = {"ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}
    return {"name": name, "cat": category, "ph": "X", **span, "args": arguments}


def _write_picture(lanes: _Lanes, file: IO[bytes]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = list(chain.from_iterable(lanes.values()))
    lane_in = min(_LANE_IN, _MOST_LANES_IN / max(1, len(lanes)))
    lanes_in = max(_LEAST_LANES_IN, lane_in * len(lanes))
    # Not pyplot: it keeps figures, and chooses a backend for the whole program.
    figure = Figure((_WIDTH_IN, lanes_in + _RATE_IN + _FRAME_IN), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[lanes_in, _RATE_IN])
    began_s = _began_s(lanes)
    _draw_requests(upper, lanes, began_s)
    _label_lanes(upper, lanes, are_numbered=lane_in >= _LEAST_NUMBERED_IN)
    _draw_rate(lower, events, began_s)
    figure.suptitle(_title(events), fontsize=11)
    figure.savefig(file, format="png", dpi=_DPI)


def _title(events: Sequence[RequestEvent]) -> str:
    if not events:
        return "no requests"
    seconds = max(event.ended_s for event in events) - min(event.started_s for event in events)
    received = sum(event.received for event in events)
    failed = sum(event.outcome != "ok" for event in events)
    rate = f": {received / seconds / 1e9:.3g} GB/s" if seconds else ""
    requests = f"{len(events):,} request{'s' * (len(events) != 1)} ({failed:,} failed)"
    return f"{received / 1e6:,.1f} MB in {requests} in {seconds:.2f} s{rate}"


def _draw_requests(axes: Axes, lanes: _Lanes, began_s: float) -> None:
    from matplotlib.patches import Patch

    for place, events in enumerate(lanes.values()):
        bars: dict[str, list[tuple[float, float]]] = {label: [] for label in _COLORS}
        for event in events:
            if event.outcome != "ok":
                bars[_FAILED].append((event.started_s - began_s, event.ended_s - event.started_s))
                continue
            bars[_WAITING].append((event.started_s - began_s, event.first_byte_s - event.started_s))
            bars[_RECEIVING].append((event.first_byte_s - began_s, event.ended_s - event.first_byte_s))
        for label, color in _COLORS.items():
            # Many may share a pixel, which then has the mean of their colours; a failure is always seen.
            edge = 1.0 if label == _FAILED else 0.0
            axes.broken_barh(bars[label], (place - 0.4, 0.8), color=color, linewidth=edge, snap=False)
    if not lanes:
        axes.text(0.5, 0.5, "no requests were recorded", transform=axes.transAxes, ha="center", va="center")
    patches = [Patch(color=color, label=label) for label, color in _COLORS.items()]
    axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(patches), frameon=False)


def _label_lanes(axes: Axes, lanes: _Lanes, *, are_numbered: bool) -> None:
    places: dict[tuple[int, int], list[int]] = {}
    for place, lane in enumerate(lanes):
        places.setdefault(lane[:2], []).append(place)
    for own in list(places.values())[1:]:
        axes.axhline(own[0] - 0.5, color="black", linewidth=0.6)
    middles = [(own[0] + own[-1]) / 2 for own in places.values()]
    axes.set_yticks(middles, list(_worker_names(lanes).values()))
    if are_numbered:
        axes.set_yticks(range(len(lanes)), [str(lane.connection) for lane in lanes], minor=True, fontsize=7)
    axes.tick_params(axis="y", which="both", length=0)
    axes.tick_params(axis="y", which="major", pad=16 if are_numbered else 4)
    axes.set_ylim(max(len(lanes), 1) - 0.5, -0.5)
    axes.set_ylabel("connections")


def _draw_rate(axes: Axes, events: Sequence[RequestEvent], began_s: float) -> None:
    """The bytes of a request are spread evenly over the time of its receiving."""
    import numpy as np

    end_s = max((event.ended_s for event in events), default=began_s) - began_s
    edges = np.linspace(0.0, end_s or 1.0, _BINS + 1)
    # What all had received at each edge; its slope is the rate.
    total = np.zeros(len(edges))
    for event in events:
        if event.received:
            # From one time to the same there would be no slope.
            times_s = (event.first_byte_s - began_s, max(event.ended_s, event.first_byte_s + 1e-9) - began_s)
            total += np.interp(edges, times_s, (0.0, event.received))
    axes.stairs(np.diff(total) / np.diff(edges) / 1e9, edges, fill=True, color=_COLORS[_RECEIVING])
    axes.set_xlim(0.0, 1.01 * edges[-1])  # what is last is not cut
    axes.set_ylim(bottom=0.0, top=None if events else 1.0)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylabel("GB/s received")
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)
