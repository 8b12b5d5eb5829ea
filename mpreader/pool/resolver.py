"""Source resolver: finds out versions and routes of sources in background threads, on the caller's side.

HEAD requests and the renewal of credentials block on the network, and the coordinator's thread must not. Sources stay
with the caller: they hold clients and credentials, which can't cross a process border; only versions and routes do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

from mpreader.errors import MpreaderError, TransportError
from mpreader.pool.requests import ReadId, SourceResolved
from mpreader.pool.source import Source

__all__ = ["SourceResolver"]

# HEADs of a checkpoint's files go out together, or hundreds of files would cost seconds.
MAX_THREADS: Final = 16


class SourceResolver:
    """Answers ResolveSource. ``resolve`` and ``close`` are called by one thread at a time, the coordinator's."""

    def __init__(self, tell: Callable[[object], None]) -> None:
        """Make a resolver that sends its answers by ``tell``, from its own threads."""
        self._tell = tell
        self._questions: queue.SimpleQueue[tuple[ReadId, int, Source, bool] | None] = queue.SimpleQueue()
        self._threads = 0
        self._unanswered = 0

    def resolve(self, read: ReadId, number: int, source: Source, *, needs_version: bool) -> None:
        """Begin to find out the route of a source, and its version if that is needed; SourceResolved answers."""
        self._unanswered += 1
        if self._threads < min(self._unanswered, MAX_THREADS):
            self._threads += 1
            # Daemons: a HEAD that hangs must not keep the interpreter from exiting.
            threading.Thread(target=self._run, name="mpreader-sources", daemon=True).start()
        self._questions.put((read, number, source, needs_version))

    def close(self) -> None:
        """Let the threads end; one that is blocked on the network ends after it."""
        for _ in range(self._threads):
            self._questions.put(None)
        self._threads = 0

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            read, number, source, needs_version = question
            self._tell(_resolve(read, number, source, needs_version=needs_version))
            self._unanswered -= 1
            del question, source  # an idle thread must keep neither client nor credentials


def _resolve(read: ReadId, number: int, source: Source, *, needs_version: bool) -> SourceResolved:
    try:
        version = source.open() if needs_version else None
        return SourceResolved(read, number, version, source.route(), None)
    except MpreaderError as error:
        return SourceResolved(read, number, None, None, error)
    except Exception as error:  # noqa: BLE001  # whatever a library raises must reach the consumer, not end a thread
        wrapped = TransportError(f"can't open {source.uri}: {error!r}", bucket=source.bucket, key=source.key)
        wrapped.__cause__ = error
        return SourceResolved(read, number, None, None, wrapped)
