"""The objects that are being read: their versions and routes, asked for in background threads.

HEAD requests and the renewal of credentials block on the network; the coordinator's thread must not.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from mpreader.errors import MpreaderError, TransportError
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.worker.route import Route

__all__ = ["Resolved", "SourceBook", "SourceEntry"]

# HEADs of a checkpoint's files go out together, or hundreds of files would cost seconds.
MAX_THREADS: Final = 16
# A signature dies with the session token that made it, after 5 minutes for directory buckets; making one is cheap.
_ROUTE_AGE_S: Final = 240.0


class SourceEntry:
    """What is known of a source.

    Attributes:
        version: The pinned version; None until it is known.
        route: How workers get to it; None until it is known.
        error: Why it can't be read, if so.
        is_renewing: Whether its route is known to be too old and a new one is on its way.
    """

    __slots__ = ("error", "is_renewing", "route", "route_made", "source", "users", "version")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.version: ObjectVersion | None = None
        self.route: Route | None = None
        self.error: MpreaderError | None = None
        self.is_renewing = False
        self.route_made = 0.0
        self.users = 0


class Resolved(NamedTuple):
    """What a thread found out; ``version`` is None where only a new route was asked for."""

    entry: SourceEntry
    version: ObjectVersion | None
    route: Route | None
    error: MpreaderError | None


class SourceBook:
    """All sources in use. Owned by the coordinator's thread; its own threads only ask and tell."""

    def __init__(self, tell: Callable[[object], None]) -> None:
        self._tell = tell
        self._entries: dict[int, SourceEntry] = {}
        self._questions: queue.SimpleQueue[tuple[SourceEntry, bool] | None] = queue.SimpleQueue()
        self._threads = 0
        self._unanswered = 0

    def use(self, source: Source) -> SourceEntry:
        """The entry of a source, made and opened when it is new; to be given back by ``release``."""
        entry = self._entries.get(id(source))
        if entry is None:
            entry = self._entries[id(source)] = SourceEntry(source)
            self._ask(entry, is_new=True)
        entry.users += 1
        return entry

    def release(self, entry: SourceEntry) -> None:
        """Give an entry back; the last user's release forgets it."""
        entry.users -= 1
        if not entry.users:
            self._entries.pop(id(entry.source), None)

    def renew(self, entry: SourceEntry) -> None:
        """Get a new route; parts must wait for it, the old one was refused."""
        if not entry.is_renewing:
            entry.is_renewing = True
            self._ask(entry, is_new=False)

    def renew_if_old(self, entry: SourceEntry, now: float) -> None:
        """Get a new route in good time; the old one is still good meanwhile."""
        if now - entry.route_made > _ROUTE_AGE_S:
            entry.route_made = now
            self._ask(entry, is_new=False)

    def apply(self, resolved: Resolved) -> None:
        """Note an answer."""
        self._unanswered -= 1
        entry = resolved.entry
        if resolved.error is not None and entry.route is not None and not entry.is_renewing:
            return  # renewed in good time only: the old route may still serve
        entry.is_renewing = False
        entry.route_made = time.monotonic()
        entry.version = resolved.version or entry.version
        entry.route = resolved.route or entry.route
        entry.error = resolved.error

    def close(self) -> None:
        """Let the threads end; one that is blocked on the network ends after it."""
        for _ in range(self._threads):
            self._questions.put(None)

    def _ask(self, entry: SourceEntry, *, is_new: bool) -> None:
        self._unanswered += 1
        if self._threads < min(self._unanswered, MAX_THREADS):
            self._threads += 1
            # Daemons: a HEAD that hangs must not keep the interpreter from exiting.
            threading.Thread(target=self._answer, name="mpreader-sources", daemon=True).start()
        self._questions.put((entry, is_new))

    def _answer(self) -> None:
        while (question := self._questions.get()) is not None:
            entry, is_new = question
            self._tell(_resolve(entry, is_new))


def _resolve(entry: SourceEntry, is_new: bool) -> Resolved:
    source = entry.source
    try:
        version = source.open() if is_new else None
        return Resolved(entry, version, source.route(), None)
    except MpreaderError as error:
        return Resolved(entry, None, None, error)
    except Exception as error:  # noqa: BLE001  # whatever a library raises must reach the consumer, not end a thread
        wrapped = TransportError(f"can't open {source.uri}: {error!r}", bucket=source.bucket, key=source.key)
        wrapped.__cause__ = error
        return Resolved(entry, None, None, wrapped)
