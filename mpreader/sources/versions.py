"""Versions of objects: requests those of many objects at once, and waits no longer than a deadline.

Used where the size of an object must be known before its bytes are requested: by the fetchers for ranges that count
from the end, and by the fsspec file system. It must not read bytes. For all other objects the pool itself requests the
version, with the first read.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Final

from mpreader.errors import ObjectChanged, PoolClosed, PoolTimeout
from mpreader.pool.background import BackgroundThreads
from mpreader.pool.blocking import make_queue
from mpreader.pool.source import ObjectVersion, Refusal, Reroutable, Source
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import find_change

__all__ = ["PinnedSource", "SteadySource", "resolve_versions", "try_resolve_versions"]

_CLOSED_POLL_S: Final = 0.25  # time between two checks whether the caller has been closed

# Index of a source, with its version or the error.
_Outcomes = queue.SimpleQueue[tuple[int, "ObjectVersion | Exception"]]


class SteadySource:
    """Source whose reads are all of the version that the first of them has found.

    It is for reads one after the other: those of a load and what the load reads again. See
    :class:`mpreader.pool.source.Source`.

    Args:
        source: Source of the object.

    Attributes:
        version: The version, with the validators that reads have found since; None before the first read.
        bucket: Bucket of ``source``.
        key: Key of ``source``.
        uri: URI of ``source``.
    """

    version: ObjectVersion | None = None

    def __init__(self, source: Source) -> None:
        self.bucket = source.bucket
        self.key = source.key
        self.uri = source.uri
        self._source = source

    @property
    def max_attempts(self) -> int:
        """Largest number of requests that are made for the same bytes."""
        return self._source.max_attempts

    def open(self) -> ObjectVersion:
        """Request the object's present version, once; see :meth:`mpreader.pool.source.Source.open`."""
        if self.version is None:
            self.version = self._source.open()
        return self.version

    def learn(self, version: ObjectVersion) -> None:
        """Take over the validators that a read has found; see :class:`mpreader.pool.source.LearningSource`."""
        if self.version is None:  # another rank of this host has requested it
            self.version = version
        else:
            self.version = _learned(self.uri, self.bucket, self.key, self.version, version)

    def route(self) -> Route:
        """Make a new route; see :meth:`mpreader.pool.source.Source.route`."""
        return self._source.route()

    def other_route(self, refusal: Refusal) -> Route | None:
        """Make a route of another kind; see :meth:`mpreader.pool.source.Reroutable.other_route`."""
        return self._source.other_route(refusal) if isinstance(self._source, Reroutable) else None


class PinnedSource(SteadySource):
    """Source whose version is known already: opening it makes no request. See :class:`mpreader.pool.source.Source`.

    Args:
        source: Source of the object.
        version: The only version of the object that may be read.

    Attributes:
        version: The known version, with the validators that reads have found since.
    """

    version: ObjectVersion

    def __init__(self, source: Source, version: ObjectVersion) -> None:
        super().__init__(source)
        self.version = version


def _learned(uri: str, bucket: str, key: str, known: ObjectVersion, version: ObjectVersion) -> ObjectVersion:
    """Returns the known version of an object with the validators of what a read has found.

    Raises:
        ObjectChanged: It has found another version.
    """
    change: object = find_change(known.validators, version.validators)
    if change is None and known.size != version.size:
        change = f"it has {version.size} bytes, not {known.size}"
    if change is not None:
        raise ObjectChanged(
            f"{uri}: the object was overwritten while it was read: {change}; read it again", bucket=bucket, key=key
        )
    return known.learned(version.validators)


def resolve_versions(sources: Sequence[Source], deadline: float, is_closed: Callable[[], bool]) -> list[PinnedSource]:
    """Request the versions of all sources at once; the first error ends the wait.

    Args:
        sources: Sources of the objects.
        deadline: Time at which to stop waiting, by the monotonic clock; infinity: never.
        is_closed: Returns True once the caller has been closed, which ends the wait.

    Returns:
        The sources with their versions, in the order of the input.

    Raises:
        TransportError: The version of an object could not be had.
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
    """Request all versions like :func:`resolve_versions`, but return errors instead of raising the first one.

    Args:
        sources: Sources of the objects.
        deadline: Time at which to stop waiting, by the monotonic clock; infinity: never.
        is_closed: Returns True once the caller has been closed, which ends the wait.

    Returns:
        In the order of the input: the source with its version, or the error if the version could not be had.

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
    """Yield the index of each source with its version or the error, in the order of arrival."""
    outcomes: _Outcomes = make_queue()
    threads = BackgroundThreads("mpreader-stat")
    # The threads are closed in every case: after the last outcome, after the first error (the caller then closes this
    # generator) and after the deadline. HEADs that have not begun are dropped, and nobody waits for one that hangs.
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
            # Closing the caller from another thread does not wake this wait, so it is interrupted for a check.
            return outcomes.get(timeout=min(left_s, _CLOSED_POLL_S))
        except queue.Empty:  # a part of the wait is over, or all of it, which the next round notices
            if is_closed():
                raise PoolClosed("the pool was closed; make a new one") from None
