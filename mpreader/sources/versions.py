"""The versions of objects, asked for at one time, and not waited for beyond a deadline."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from mpreader.errors import PoolClosed, PoolTimeout
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.worker.route import Route

__all__ = ["PinnedSource", "pin"]

_MAX_OPENERS: Final = 16
_CLOSED_POLL_S: Final = 0.25

_Answers = queue.SimpleQueue[tuple[int, "ObjectVersion | Exception"]]


class PinnedSource:
    """A source whose version is known already: it needs no second HEAD."""

    def __init__(self, source: Source, version: ObjectVersion) -> None:
        self.version = version
        self.bucket = source.bucket
        self.key = source.key
        self.uri = source.uri
        self.max_attempts = source.max_attempts
        self._source = source

    def open(self) -> ObjectVersion:
        """The version that is known."""
        return self.version

    def route(self) -> Route:
        """Make a fresh route."""
        return self._source.route()


def pin(sources: Sequence[Source], deadline: float, is_closed: Callable[[], bool]) -> list[PinnedSource]:
    """Ask the servers for the versions of all sources at once.

    Args:
        sources: The objects.
        deadline: How long to wait, by the monotonic clock.
        is_closed: Whether nobody wants to know any more.

    Raises:
        TransportError: One could not be found out.
        PoolTimeout: The time was up.
        PoolClosed: ``is_closed`` said so.
    """
    answers: _Answers = queue.SimpleQueue()
    numbers = iter(range(len(sources)))
    lock = threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                answers.put((number, sources[number].open()))
            except Exception as error:  # noqa: BLE001  # it is raised where it is waited for
                answers.put((number, error))

    # Daemons: a HEAD that hangs must keep neither the caller beyond its deadline nor the interpreter from exiting.
    for _ in range(min(len(sources), _MAX_OPENERS)):
        threading.Thread(target=ask, name="mpreader-stat", daemon=True).start()
    versions: dict[int, ObjectVersion] = {}
    while len(versions) < len(sources):
        number, version = _await(answers, deadline, is_closed)
        if isinstance(version, Exception):
            raise version
        versions[number] = version
    return [PinnedSource(source, versions[number]) for number, source in enumerate(sources)]


def _await(answers: _Answers, deadline: float, is_closed: Callable[[], bool]) -> tuple[int, ObjectVersion | Exception]:
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise PoolTimeout("the server had not told the object's size when the time given to the call was up")
        try:
            return answers.get(timeout=min(left_s, _CLOSED_POLL_S))
        except queue.Empty:
            if is_closed():
                raise PoolClosed("the pool was closed; make a new one") from None
