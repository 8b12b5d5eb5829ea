"""Chrome trace of a timeline: a process for each worker, a thread for each connection.

A saved timeline (:mod:`mpreader.telemetry.timeline`) calls :func:`write_trace`. chrome://tracing and
https://ui.perfetto.dev read the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from mpreader.telemetry.events import RequestEvent
from mpreader.telemetry.rows import Rows, first_start_s, worker_names

__all__ = ["write_trace"]


def write_trace(rows: Rows, file: IO[bytes]) -> None:
    """Write the rows in Chrome's trace event format."""
    began_s = first_start_s(rows)
    names = worker_names(rows)
    # Invented ids, since workers of several pools, and connections, have no ids of their own that are unique.
    pids = {worker: pid for pid, worker in enumerate(names, 1)}
    trace = [_name("process_name", name, pids[worker], 0) for worker, name in names.items()]
    # No thread gets the number of a process, or 0: Perfetto takes the former for a main thread, the latter for an idle
    # processor.
    for tid, (connection, events) in enumerate(rows.items(), len(pids) + 1):
        place = {"pid": pids[connection[:2]], "tid": tid}
        trace.append(_name("thread_name", f"connection {connection.connection}", **place))
        trace += (place | part for event in events for part in _slices(event, began_s))
    document = {"traceEvents": trace, "displayTimeUnit": "ms"}
    file.write(json.dumps(document, separators=(",", ":")).encode())


def _name(kind: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    """Metadata entry (phase M) that names a process or a thread."""
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _slices(event: RequestEvent, began_s: float) -> Iterator[dict[str, Any]]:
    """Slices of one request: the whole, within it the wait for its first byte, and the receiving if there was any."""
    # In whole nanoseconds: with rounded fractions a part could end after the whole that it lies in.
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
    """Complete event (phase X): a slice with a start and a duration."""
    span = {"ts": start_ns / 1e3, "dur": (end_ns - start_ns) / 1e3}  # the format counts microseconds
    return {"name": name, "cat": category, "ph": "X", **span, "args": arguments}
