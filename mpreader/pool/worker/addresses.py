"""Addresses of servers: which ones a worker leaves alone for a while, since their requests were slow or failed.

Used by :mod:`~mpreader.pool.worker.transport`, which connects to them, and by
:mod:`~mpreader.pool.worker.connection`, which says how their requests went. All threads of a worker share one
:class:`Addresses`. There is no lock: each entry is replaced by one assignment, and threads that write the same one at
the same time write about the same.
"""

from __future__ import annotations

import os
import time
from typing import Any, Final, NamedTuple

__all__ = ["Address", "Addresses"]

# As the socket module has it: host and port, and two more numbers for IPv6.
Address = tuple[Any, ...]

# One request in fifty is slow at every address; two in a row say something about this one.
_STRIKES: Final = 2
_SHORTEST_AVOIDANCE_S: Final = 5.0
_LONGEST_AVOIDANCE_S: Final = 300.0
# S3 has thousands of addresses, of which each look-up tells eight.
_MOST_ADDRESSES: Final = 1024


class _Record(NamedTuple):
    """Record of an address: how the requests to it went, and how long it is left alone.

    Attributes:
        strikes: Requests in a row that were slow or failed.
        avoided_until_s: Time until which other addresses are preferred, by the monotonic clock.
        avoidance_s: How long that was the last time.
    """

    strikes: int = 0
    avoided_until_s: float = 0.0
    avoidance_s: float = 0.0


_UNKNOWN: Final = _Record()


class Addresses:
    """Addresses of servers, as one worker knows them: in which order to try them, and which ones to leave alone."""

    def __init__(self) -> None:
        self._records: dict[Address | None, _Record] = {}
        self._of_host: dict[tuple[str, int], tuple[Address, ...]] = {}  # by host and port, as last looked up

    def ordered(self, host: str, port: int, found: list[tuple[Any, Any, Any, Any, Address]]) -> list[Any]:
        """Order in which the results of a look-up are to be tried.

        The order is random, so that the connections of all workers spread over the several addresses that S3 has, but
        avoided addresses come last: that whose time is over soonest before the others.

        Args:
            host: Host that was looked up.
            port: Its port.
            found: What ``socket.getaddrinfo`` returned.
        """
        now = time.monotonic()
        _set(self._of_host, (host, port), tuple(info[4] for info in found))
        # Random keys by the operating system: the random module would add 1 ms to a worker's start.
        return sorted(found, key=lambda info: (max(now, self._record(info[4]).avoided_until_s), os.urandom(4)))

    def should_leave(self, host: str, port: int, address: Address | None) -> bool:
        """True if a kept connection should not be used: its address is avoided, and the host has others."""
        now = time.monotonic()
        if address is None or self._record(address).avoided_until_s <= now:
            return False
        return any(self._record(other).avoided_until_s <= now for other in self._of_host.get((host, port), ()))

    def served(self, address: Address | None) -> None:
        """Note that a request brought all its bytes.

        What is said of an avoided address stays until its time is over: other requests to it were under way before.
        """
        if self._records and self._record(address).avoided_until_s <= time.monotonic():
            self._records.pop(address, None)  # not del: another thread may just have done so

    def struck(self, address: Address | None) -> None:
        """Note that a request was slow, or broke; after two in a row the address is avoided."""
        if address is None:
            return
        record = self._record(address)
        if record.strikes + 1 < _STRIKES:
            _set(self._records, address, record._replace(strikes=record.strikes + 1))
        else:
            self.refused(address)

    def refused(self, address: Address) -> None:
        """Note that no connection can be made: the address is avoided at once, for longer each time."""
        now = time.monotonic()
        record = self._record(address)
        if record.avoided_until_s > now:
            return  # several connections of one time count as one
        avoidance_s = min(_LONGEST_AVOIDANCE_S, max(_SHORTEST_AVOIDANCE_S, 2 * record.avoidance_s))
        _set(self._records, address, _Record(_STRIKES, now + avoidance_s, avoidance_s))

    def _record(self, address: Address | None) -> _Record:
        return self._records.get(address, _UNKNOWN)


def _set(entries: dict[Any, Any], key: object, value: object) -> None:
    if key in entries or len(entries) < _MOST_ADDRESSES:
        entries[key] = value
    else:  # what was learnt is worth no more than some slow requests
        entries.clear()
