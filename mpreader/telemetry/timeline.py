"""Timelines: the requests of every connection over time, recorded while a program runs, saved as a picture or a trace.

::

    with record_timeline() as timeline:
        dcp.load(state, storage_reader=reader)
    timeline.save("load.png")

This module records, and checks paths; :mod:`~mpreader.telemetry.picture` and :mod:`~mpreader.telemetry.trace` write the
files. Programs use :func:`record_timeline`, the commands ``load`` and ``fetch`` use :func:`timeline_to`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from mpreader.errors import ConfigError
from mpreader.files import whole_file
from mpreader.telemetry.events import RequestEvent, add_observer, remove_observer
from mpreader.telemetry.picture import write_picture
from mpreader.telemetry.rows import Rows, connection_rows
from mpreader.telemetry.trace import write_trace

__all__ = ["Timeline", "check_timeline_path", "record_timeline", "timeline_to"]


class Timeline:
    """Requests of all worker pools of the process that ended while it was recorded. Thread-safe."""

    def __init__(self) -> None:
        # Each with the id of the thread that reported it, which is its pool's own: workers of two pools have the same
        # numbers. The list is only appended to, which is atomic, and copied before it is iterated over.
        self._recorded: list[tuple[int, RequestEvent]] = []

    @property
    def events(self) -> tuple[RequestEvent, ...]:
        """Recorded requests, in the order in which they ended."""
        return tuple(event for _, event in tuple(self._recorded))

    @property
    def recorded(self) -> tuple[tuple[int, RequestEvent], ...]:
        """The same, each with the number of its pool's thread: what :meth:`add` takes in another process."""
        return tuple(self._recorded)

    def add(self, process: int, recorded: Iterable[tuple[int, RequestEvent]]) -> None:
        """Add what another process of this host has recorded.

        Args:
            process: Number of the process, from 1; its pools are told apart from those of others.
            recorded: Its requests, from :attr:`recorded`.
        """
        self._recorded += [((process << 64) + thread, event) for thread, event in recorded]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline to a file. A file of this name is replaced once the new one is whole.

        Args:
            path: ``.png``: a picture, a row for each connection. ``.json``: a Chrome trace, for chrome://tracing or
                https://ui.perfetto.dev.

        Raises:
            ConfigError: As for :func:`check_timeline_path`.
            OSError: The file can't be written.
        """
        write = _writer(path)  # before the file is made
        with whole_file(path) as file:
            write(connection_rows(tuple(self._recorded)), file)

    def _record(self, event: RequestEvent) -> None:
        """Add a request. Runs in the thread of the pool that made it."""
        self._recorded.append((threading.get_ident(), event))

    def __repr__(self) -> str:
        return f"Timeline({len(self._recorded)} requests)"


@contextmanager
def record_timeline() -> Iterator[Timeline]:
    """Record the requests of all worker pools of this process while the block runs."""
    timeline = Timeline()
    add_observer(timeline._record)
    try:
        yield timeline
    finally:
        remove_observer(timeline._record)


@contextmanager
def timeline_to(path: str | os.PathLike[str] | None) -> Iterator[Timeline | None]:
    """Record a timeline while the block runs, and save it when the block ends, also if it raises.

    Args:
        path: As for :meth:`Timeline.save`. None: the block runs, and nothing is recorded or saved.

    Yields:
        The timeline; None if there is no path.

    Raises:
        ConfigError: As for :func:`check_timeline_path`, before the block runs.
        OSError: The file can't be written.
    """
    if path is None:
        yield None
        return
    check_timeline_path(path)
    with record_timeline() as timeline:
        try:
            yield timeline
        finally:
            timeline.save(path)


def check_timeline_path(path: str | os.PathLike[str]) -> None:
    """Check that a timeline can be saved to ``path``: a wrong path should be refused before the work, not after it.

    Raises:
        ConfigError: The name ends neither in ``.png`` nor in ``.json``; or it is a folder's, or in none that exists
            and may be written to; or a picture is wanted, and matplotlib is not installed.
    """
    _writer(path)


def _writer(path: str | os.PathLike[str]) -> Callable[[Rows, IO[bytes]], None]:
    """Function that writes the kind of file that ``path`` names; raises as :func:`check_timeline_path` does."""
    final = Path(path)
    suffix = final.suffix.lower()
    if suffix not in (".png", ".json"):
        raise ConfigError(f"{final}: a timeline is saved as .png (a picture) or .json (a Chrome trace)")
    if not final.parent.is_dir():
        raise ConfigError(f"{final}: there is no folder {str(final.parent)!r}")
    if final.is_dir() or not os.access(final.parent, os.W_OK):
        raise ConfigError(f"{final}: this can't be written: it is a folder, or in one that is read-only")
    if suffix == ".json":
        return write_trace
    if find_spec("matplotlib") is None:  # looked for, not imported: it is slow, and a path may be checked in vain
        raise ConfigError("a timeline as .png needs matplotlib: pip install 'mpreader[plot]', or save it as .json")
    return write_picture
