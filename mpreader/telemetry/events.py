"""Events: the facts of every request that a worker has ended and of every load, and the observers that are told them.

Timelines and metrics are observers. A pool's coordinator calls those of requests from its own thread; while there are
none it makes no events, so that a request costs one attribute look-up. The storage reader calls those of loads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

__all__ = [
    "LoadEvent",
    "LoadObserver",
    "Observer",
    "RequestEvent",
    "add_load_observer",
    "add_observer",
    "observers",
    "remove_load_observer",
    "remove_observer",
    "report_load",
]

log = logging.getLogger(__name__)


class RequestEvent(NamedTuple):
    """One GET of a worker, from the request to its last byte or its failure. Holds no secret.

    Attributes:
        uri: The object: ``s3://bucket/key``, or the URL without user name, password and query.
        worker: Number of the worker in its pool, from 0.
        connection: Number of the connection in its worker, from 0.
        start: First byte that was asked for.
        end: One past the last byte that was asked for.
        received: Bytes that arrived, from ``start``.
        started_s: Time at which the request was begun, by the monotonic clock.
        first_byte_s: Time at which the response began; ``ended_s`` if there was none.
        ended_s: Time at which it ended.
        outcome: ``"ok"``, or why it failed: ``"broken"``, ``"stalled"``, ``"busy"``, …; ``"slow"``, which is no
            failure, if it was cut since it was much slower than others.
        attempt: 1 for the first request for these bytes; a request that was cut does not count.
    """

    uri: str
    worker: int
    connection: int
    start: int
    end: int
    received: int
    started_s: float
    first_byte_s: float
    ended_s: float
    outcome: str
    attempt: int


class LoadEvent(NamedTuple):
    """One load of a checkpoint that has reached its end. Holds no secret.

    Attributes:
        uri: The checkpoint.
        verified_bytes: Bytes of the items whose checksum was compared.
        unverified_bytes: Bytes of the items whose checksum was not compared.
    """

    uri: str
    verified_bytes: int
    unverified_bytes: int


Observer = Callable[[RequestEvent], object]
LoadObserver = Callable[[LoadEvent], object]

_lock = threading.Lock()  # two threads that add observers at the same time must not lose one
# Replaced as a whole, never changed in place, since they are read, and iterated over, without the lock.
observers: tuple[Observer, ...] = ()
_load_observers: tuple[LoadObserver, ...] = ()


def add_observer(observer: Observer) -> None:
    """Have ``observer`` called at the end of every request of every pool of this process, from the pool's own thread.

    The pool waits while the observer runs. An exception of the observer is logged, and harms no load.
    """
    global observers
    with _lock:
        observers = (*observers, observer)


def remove_observer(observer: Observer) -> None:
    """Have ``observer`` called no more. Harmless if it was not added."""
    global observers
    with _lock:
        # By equality, not identity: each look-up of a method makes another object, all equal.
        observers = tuple(known for known in observers if known != observer)


def add_load_observer(observer: LoadObserver) -> None:
    """Have ``observer`` called at the end of every load of this process, from the thread that loads."""
    global _load_observers
    with _lock:
        _load_observers = (*_load_observers, observer)


def remove_load_observer(observer: LoadObserver) -> None:
    """Have ``observer`` called no more. Harmless if it was not added."""
    global _load_observers
    with _lock:
        _load_observers = tuple(known for known in _load_observers if known != observer)


def report_load(event: LoadEvent) -> None:
    """Tell the observers of loads. An exception of an observer is logged, and harms no load."""
    for observe in _load_observers:
        try:
            observe(event)
        except Exception:  # noqa: PERF203  # each on its own: one that fails must not hide the event from the others
            log.exception("an observer of loads failed")
