"""Who wants to know of every request that ends: timelines, metrics. Nobody costs nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Observer", "RequestEvent", "add_observer", "observers", "remove_observer"]


class RequestEvent(NamedTuple):
    """One GET of a worker, from the request to its last byte or its failure. Holds no secret.

    Attributes:
        uri: The object, ``s3://bucket/key`` or the URL without its secrets.
        worker: The worker's place in the pool, from 0.
        connection: The connection's place in the worker, from 0.
        start: First byte that was asked for.
        end: One past the last.
        received: Bytes that arrived, from ``start``.
        started_s: When the request was begun, by the monotonic clock.
        first_byte_s: When the answer began; ``ended_s`` where there was none.
        ended_s: When it ended.
        outcome: ``"ok"``, or why it failed: ``"broken"``, ``"stalled"``, ``"busy"``, …
        attempt: 1 for the first request for these bytes.
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

_lock = threading.Lock()
observers: tuple[Observer, ...] = ()  # replaced, never changed: it is read without the lock


def add_observer(observer: Observer) -> None:
    """Let it be called at the end of every request of every pool of this process, from the pool's own thread."""
    global observers
    with _lock:
        observers = (*observers, observer)


def remove_observer(observer: Observer) -> None:
    """Call it no more. Harmless if it is not called anyway."""
    global observers
    with _lock:
        observers = tuple(known for known in observers if known != observer)
