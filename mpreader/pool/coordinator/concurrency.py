"""Concurrency limiter: bounds the parts in flight, for each server and size of part, to as many as bring more bytes.

The coordinator asks it before it sends a part, and tells it of each part that arrives. It sends nothing itself, and
keeps no part: it knows rates and times only.

S3 gives about 90 MB/s to a connection, so many are needed. A server that gives a gigabyte per second, next door or in
front of S3, is drained by a few; more of them would only spread the same bytes over more memory, none of it in the
processor's cache, and threads over processors that have no time for them. Two facts about each part that arrives tell
the cases apart:

* its rate: ``workers`` times what one can receive, divided by the rate of one part, is enough;
* the share of its time in which its thread was ready to run, and waited for a processor: where that is high, the
  host has no more to give.

Before the first part has arrived, the limit is doubled step by step, as long as processors are idle meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from mpreader.host import usable_cores

__all__ = ["ConcurrencyLimiter", "is_host_busy"]

# Bytes that a worker can receive: it takes 0.25 to 0.35 s of processor time per GB over loopback, measured, and a
# processor has other things to do.
WORKER_BYTES_PER_S: Final = 2e9
# Shares of a part's time in which its thread waited for a processor: below the first one the limit may rise, above the
# second one it falls. Between them it stays, or it would go up and down with every part.
_LOW_PRESSURE: Final = 0.15
_HIGH_PRESSURE: Final = 0.35
# Weight of the newest part in the averages. A rate falls much more slowly than it rises: a server that was fast once,
# while nothing else went on, may be so again.
_RISE: Final = 0.2
_FALL: Final = 0.01
# A fast server has responded by then; a slow one is asked for more meanwhile.
_FIRST_RESPONSE_S: Final = 0.04
_DOUBLING_S: Final = 0.015

ServerAndSize = tuple[str, int, int]


class _History:
    """Averages over the parts of one server and about one size.

    Attributes:
        limit: Parts that may be in flight.
        next_step: Time at which the limit may be doubled, while no part has arrived.
        bytes_per_s: Rate of a part; 0 until the first one has arrived.
        pressure: Share of a part's time in which its thread waited for a processor.
    """

    __slots__ = ("bytes_per_s", "limit", "next_step", "pressure")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self.next_step = now + _FIRST_RESPONSE_S
        self.bytes_per_s = 0.0
        self.pressure = 0.0


class ConcurrencyLimiter:
    """Limits of all servers. Not thread-safe: owned by the coordinator's thread.

    Args:
        workers: Worker processes; at least two parts for each are let through, one being received, one to follow.
        max_parts: Parts that may ever be in flight.
        is_host_busy: Returns True while all processors have something to do.
    """

    def __init__(self, workers: int, max_parts: int, is_host_busy: Callable[[], bool]) -> None:
        self._workers = workers
        self._max_parts = max_parts
        self._is_host_busy = is_host_busy
        self._min_parts = min(2 * workers, max_parts)
        self._known: dict[ServerAndSize, _History] = {}

    def limit(self, host: str, port: int, nbytes: int, now: float) -> int:
        """Parts that may be in flight when the next one is of ``nbytes`` bytes from this server."""
        history = self._history_of(host, port, nbytes, now)
        if not history.bytes_per_s and now >= history.next_step:
            history.next_step = now + _DOUBLING_S
            if not self._is_host_busy():
                history.limit = min(self._max_parts, 2 * history.limit)
        return history.limit

    def observe(self, host: str, port: int, nbytes: int, seconds: float, processor_wait_s: float, now: float) -> None:
        """Learn from a part that has arrived.

        Args:
            host: The server's name.
            port: Its port.
            nbytes: Bytes of the part.
            seconds: Time from the request to the last byte.
            processor_wait_s: Time, of these seconds, in which the receiving thread waited for a processor.
            now: Monotonic time.
        """
        history = self._history_of(host, port, nbytes, now)
        seconds = max(seconds, 1e-6)
        bytes_per_s, pressure = nbytes / seconds, min(1.0, processor_wait_s / seconds)
        if not history.bytes_per_s:
            history.bytes_per_s, history.pressure = bytes_per_s, pressure
        is_faster = bytes_per_s > history.bytes_per_s
        history.bytes_per_s += (_RISE if is_faster else _FALL) * (bytes_per_s - history.bytes_per_s)
        history.pressure += _RISE * (pressure - history.pressure)
        # One step for each part, and not at once: the next parts show what the step has brought.
        sufficient = math.ceil(self._workers * WORKER_BYTES_PER_S / history.bytes_per_s)
        target = max(self._min_parts, min(self._max_parts, sufficient))
        if history.limit > target or history.pressure > _HIGH_PRESSURE:
            history.limit = max(self._min_parts, history.limit - 1)
        elif history.pressure < _LOW_PRESSURE:
            history.limit = min(target, history.limit + 1)

    def _history_of(self, host: str, port: int, nbytes: int, now: float) -> _History:
        # Sizes of about the same number of bits take about as long.
        key = (host, port, nbytes.bit_length())
        history = self._known.get(key)
        if history is None:
            history = self._known[key] = _History(self._min_parts, now)
        return history


def is_host_busy() -> bool:
    """True if more threads can run now, on the whole host, than this process may use processors."""
    try:
        with open("/proc/loadavg", "rb") as file:
            runnable = int(file.read().split()[3].split(b"/")[0])
    except (OSError, ValueError, IndexError):  # a sandbox without these numbers
        return False
    # The thread that asks is one of them.
    return runnable > usable_cores()
