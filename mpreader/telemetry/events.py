"""Request events: the facts of every request that a worker has ended, and the observers that are called with them.

Timelines and metrics are observers. A pool's coordinator calls them from its own thread. While there are no observers
it makes no events, so that a request costs one attribute look-up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Observer", "RequestEvent", "add_observer", "observers", "remove_observer"]


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


Observer = Callable[[RequestEvent], object]

_lock = threading.Lock()  # two threads that add observers at the same time must not lose one
# Replaced as a whole, never changed in place, since coordinators read it, and iterate over it, without the lock.
observers: tuple[Observer, ...] = ()


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
