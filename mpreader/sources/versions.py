"""Versions of objects: asks the servers for many of them at once, and waits no longer than a deadline.

Used where the size of an object must be known before its bytes are asked for: by the fetchers for ranges that count
from the end, and by the fsspec file system. Bytes are not read here; the coordinator asks by itself for the versions
that nobody has asked for before.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Final

from mpreader.errors import PoolClosed, PoolTimeout
from mpreader.pool.background import BackgroundThreads
from mpreader.pool.source import ObjectVersion, Source
from mpreader.pool.worker.route import Route

__all__ = ["PinnedSource", "resolve_versions", "try_resolve_versions"]

_CLOSED_POLL_S: Final = 0.25

_Outcomes = queue.SimpleQueue[tuple[int, "ObjectVersion | Exception"]]


class PinnedSource:
    """A source of one version, which is known already: opening it makes no request.

    Args:
        source: The object.
        version: The version of it that may be read.
    """

    def __init__(self, source: Source, version: ObjectVersion) -> None:
        self.version = version
        self.bucket = source.bucket
        self.key = source.key
        self.uri = source.uri
        self.max_attempts = source.max_attempts
        self._source = source

    def open(self) -> ObjectVersion:
        """Return the version that is known."""
        return self.version

    def route(self) -> Route:
        """Make a fresh route; see :meth:`mpreader.pool.source.Source.route`."""
        return self._source.route()


def resolve_versions(sources: Sequence[Source], deadline: float, is_closed: Callable[[], bool]) -> list[PinnedSource]:
    """Ask the servers for the versions of all sources at once; the first error ends the wait.

    Args:
        sources: The objects.
        deadline: Moment, by the monotonic clock, at which to stop waiting; infinity: none.
        is_closed: Returns True when the caller has been closed, and does not want the versions any more.

    Returns:
        The sources with their versions, in the order of the input.

    Raises:
        TransportError: A version could not be found out.
        PoolTimeout: The deadline has passed.
        PoolClosed: ``is_closed`` returned True.
    """
    pinned: dict[int, PinnedSource] = {}
    with contextlib.closing(_outcomes(sources, deadline, is_closed)) as outcomes:
        for number, outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            pinned[number] = PinnedSource(sources[number], outcome)
    return [pinned[number] for number in range(len(sources))]


def try_resolve_versions(
    sources: Sequence[Source], deadline: float, is_closed: Callable[[], bool]
) -> list[PinnedSource | Exception]:
    """Ask as :func:`resolve_versions` does, but give an error in place of the source whose version is not to be had.

    Raises:
        PoolTimeout: The deadline has passed.
        PoolClosed: ``is_closed`` returned True.
    """
    found = dict(_outcomes(sources, deadline, is_closed))
    return [
        outcome if isinstance(outcome := found[number], Exception) else PinnedSource(source, outcome)
        for number, source in enumerate(sources)
    ]


def _outcomes(
    sources: Sequence[Source], deadline: float, is_closed: Callable[[], bool]
) -> Generator[tuple[int, ObjectVersion | Exception], None, None]:
    """Yield the index of each source with its version or the error, as they come."""
    outcomes: _Outcomes = queue.SimpleQueue()
    threads = BackgroundThreads("mpreader-stat")
    # Closed whether all outcomes have come, the first error has ended the wait, or the deadline: HEADs that have not
    # begun are then not made, and one that hangs keeps nobody.
    try:
        for number, source in enumerate(sources):
            threads.submit(source.open, partial(_put, outcomes, number))
        for _ in sources:
            yield _next(outcomes, deadline, is_closed)
    finally:
        threads.close()


def _put(outcomes: _Outcomes, number: int, outcome: ObjectVersion | Exception) -> None:
    outcomes.put((number, outcome))


def _next(outcomes: _Outcomes, deadline: float, is_closed: Callable[[], bool]) -> tuple[int, ObjectVersion | Exception]:
    while True:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise PoolTimeout("the server had not told the object's size when the time given to the call was up")
        try:
            # Another thread that closes the caller can't end this wait, so it looks now and then.
            return outcomes.get(timeout=min(left_s, _CLOSED_POLL_S))
        except queue.Empty:
            if is_closed():
                raise PoolClosed("the pool was closed; make a new one") from None
