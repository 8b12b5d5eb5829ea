"""What each connection did when: recorded while a program runs, saved as a picture or as a Chrome trace.

::

    with record_timeline() as timeline:
        dcp.load(state, storage_reader=reader)
    timeline.save("load.png")
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

from mpreader.errors import ConfigError
from mpreader.pool.observer import RequestEvent, add_observer, remove_observer

__all__ = ["Timeline", "check_timeline_path", "record_timeline", "timeline_to"]

_PROCESS: Final = 1
_MICROSECONDS: Final = 1e6


class Timeline:
    """The requests that ended while it was recorded."""

    def __init__(self) -> None:
        self._events: list[RequestEvent] = []

    @property
    def events(self) -> tuple[RequestEvent, ...]:
        """One for each request, in the order in which they ended."""
        return tuple(self._events)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file; one that is there is replaced.

        Args:
            path: ``.png``: a picture, a line for each connection. ``.json``: a Chrome trace, for chrome://tracing or
                https://ui.perfetto.dev.

        Raises:
            ConfigError: Its name ends otherwise; or a picture is wanted, and matplotlib is not installed.
            OSError: It can't be written.
        """
        write = check_timeline_path(path)
        final = Path(path)
        with tempfile.NamedTemporaryFile(dir=final.parent, prefix=f".{final.name}-", delete=False) as file:
            try:
                write(self.events, file)
                file.flush()
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, final)
            except BaseException:
                os.unlink(file.name)
                raise

    def __repr__(self) -> str:
        return f"Timeline({len(self._events)} requests)"


@contextmanager
def record_timeline() -> Iterator[Timeline]:
    """Record the requests of all worker pools of this process while the block runs."""
    timeline = Timeline()
    note = timeline._events.append
    add_observer(note)
    try:
        yield timeline
    finally:
        remove_observer(note)


@contextmanager
def timeline_to(path: str | os.PathLike[str] | None) -> Iterator[None]:
    """Record while the block runs, and save it at its end, also if it fails. None: do neither.

    Raises:
        ConfigError: As for :meth:`Timeline.save`, before the block runs.
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


Writer = Callable[[Sequence[RequestEvent], IO[bytes]], object]


def check_timeline_path(path: str | os.PathLike[str]) -> Writer:
    """Find out whether a timeline can be saved to ``path``, before there is one.

    Returns:
        What writes it.

    Raises:
        ConfigError: As for :meth:`Timeline.save`; or its folder does not exist.
    """
    final = Path(path)
    if not final.parent.is_dir():
        raise ConfigError(f"{final}: there is no folder {str(final.parent)!r}")
    suffix = final.suffix.lower()
    if suffix == ".json":
        return _write_trace
    if suffix != ".png":
        raise ConfigError(f"{final}: a timeline is saved as .png (a picture) or .json (a Chrome trace)")
    if find_spec("matplotlib") is None:
        raise ConfigError("a timeline as .png needs matplotlib: pip install 'mpreader[plot]', or save it as .json")
    from mpreader.picture import write_picture

    return write_picture


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- Chrome's trace format: one process for each worker, one thread for each connection, times in microseconds


def _write_trace(events: Sequence[RequestEvent], file: IO[bytes]) -> None:
    began_s = min((event.started_s for event in events), default=0.0)
    lanes = sorted({(event.worker, event.connection) for event in events})
    trace: list[dict[str, Any]] = [
        _name("process_name", f"worker {worker}", worker) for worker in sorted({worker for worker, _ in lanes})
    ]
    trace += [_name("thread_name", f"connection {connection}", worker, connection) for worker, connection in lanes]
    for event in events:
        trace += _slices(event, began_s)
    file.write(json.dumps({"traceEvents": trace, "displayTimeUnit": "ms"}).encode())


def _name(what: str, name: str, worker: int, connection: int = 0) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PROCESS + worker, "tid": connection, "args": {"name": name}}


def _slices(event: RequestEvent, began_s: float) -> Iterator[dict[str, Any]]:
    """The request, and within it the wait for its first byte and the receiving."""
    facts = {
        "uri": event.uri,
        "start": event.start,
        "end": event.end,
        "received": event.received,
        "outcome": event.outcome,
        "attempt": event.attempt,
    }
    name = f"{event.start}-{event.end}" if event.outcome == "ok" else f"{event.outcome} {event.start}-{event.end}"
    for title, start_s, end_s, arguments in (
        (name, event.started_s, event.ended_s, facts),
        ("wait", event.started_s, event.first_byte_s, {}),
        ("receive", event.first_byte_s, event.ended_s, {}),
    ):
        yield {
            "name": title,
            "cat": event.outcome,
            "ph": "X",
            "pid": _PROCESS + event.worker,
            "tid": event.connection,
            "ts": (start_s - began_s) * _MICROSECONDS,
            "dur": (end_s - start_s) * _MICROSECONDS,
            "args": arguments,
        }
