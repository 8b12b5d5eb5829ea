"""Connection rows: the recorded requests of a timeline, sorted by the connection that made them.

A timeline makes them when it is saved; the writers of both kinds of files, trace and picture, go through them row by
row. This module knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from mpreader.telemetry.events import RequestEvent

__all__ = ["Connection", "Rows", "connection_rows", "first_start_s", "worker_names"]


class Connection(NamedTuple):
    """Identity of a connection among all pools of the process.

    Attributes:
        pool: Number of the pool, from 0; different for pools that worked at the same time.
        worker: Number of the worker in the pool.
        connection: Number of the connection in the worker.
    """

    pool: int
    worker: int
    connection: int


Rows = Mapping[Connection, Sequence[RequestEvent]]
"""Requests of each connection, in the order in which they ended; connections in the order of their numbers."""


def connection_rows(recorded: Sequence[tuple[int, RequestEvent]]) -> Rows:
    """Sort requests by their connections.

    Args:
        recorded: Requests, each with the id of the thread that reported it. Each pool reports from a thread of its own,
            which tells apart the workers of two pools: they have the same numbers.
    """
    pools = _number_pools(recorded)
    rows: dict[Connection, list[RequestEvent]] = {}
    for thread, event in recorded:
        rows.setdefault(Connection(pools[thread], event.worker, event.connection), []).append(event)
    return {connection: rows[connection] for connection in sorted(rows)}


def worker_names(rows: Rows) -> dict[tuple[int, int], str]:
    """Names of the workers, by pool and worker; they name the pool, too, if there are several."""
    has_pools = any(connection.pool for connection in rows)  # numbers from 0: only a second pool has another one
    return {row[:2]: (f"pool {row.pool}, " if has_pools else "") + f"worker {row.worker}" for row in rows}


def first_start_s(rows: Rows) -> float:
    """Time of the first request's start, by the monotonic clock; 0 if there is none."""
    return min((event.started_s for event in chain.from_iterable(rows.values())), default=0.0)


def _number_pools(recorded: Sequence[tuple[int, RequestEvent]]) -> dict[int, int]:
    """Number of the pool of each thread, from 0.

    Threads that worked one after the other share a number: a pool that was idle goes on with a new thread, and must not
    look like two pools.
    """
    # For each thread the time from its first request's start to its last one's end.
    spans: dict[int, tuple[float, float]] = {}
    for thread, event in recorded:
        began_s, ended_s = spans.get(thread, (event.started_s, event.ended_s))
        spans[thread] = min(began_s, event.started_s), max(ended_s, event.ended_s)
    numbers: dict[int, int] = {}
    busy_until_s: list[float] = []  # end of the last thread that got each number
    # In the order in which they began, each thread gets the lowest number whose last thread had ended by then.
    for thread, (began_s, ended_s) in sorted(spans.items(), key=lambda item: item[1]):
        free = (number for number, until_s in enumerate(busy_until_s) if until_s <= began_s)
        numbers[thread] = number = next(free, len(busy_until_s))
        busy_until_s[number : number + 1] = [ended_s]  # replaces the entry, or appends one for a new number
    return numbers
