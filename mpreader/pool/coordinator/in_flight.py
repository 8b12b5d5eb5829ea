"""Requests in flight: how far each one is, and how others to the same server went.

Used by :mod:`~mpreader.pool.coordinator.tail` and :mod:`~mpreader.pool.coordinator.halving`, which decide by it, in the
coordinator's thread. It keeps numbers only, and decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from mpreader.pool.worker.messages import PartProgress

__all__ = ["Cut", "History", "InFlight", "Peer", "Request", "Server", "ServerAndSize", "quantile"]

ServerAndSize = tuple[str, int, int]  # host, port, bytes of the request

_PEERS_KEPT: Final = 64  # requests that ended lately, for each server and size
# What is usual is computed anew after so many of them: sorting at each part would cost more than all the rest.
_PEERS_PER_LOOK: Final = 8
# A time without any byte from a server, to which at least so many requests are in flight, is a pause for all of them if
# it is longer than this. It does not count for the age of those requests, nor do some more seconds, as a share of it: a
# server that goes on does not serve all at the same moment.
_LEAST_PAUSE_S: Final = 0.2
_PAUSE_WITNESSES: Final = 3
_RESUMPTION: Final = 0.1
# Some servers send in bursts: bytes that come within so many seconds are taken for one.
_BURST_S: Final = 0.2


class Peer(NamedTuple):
    """Example for other requests: a request that has ended, or one in flight, as it was last reported.

    Attributes:
        first_byte_s: Seconds from its start until its first byte.
        bytes_per_s: Rate from its first byte on; more than 0.
        ended_s: Time, by the monotonic clock, at which it ended or was reported.
    """

    first_byte_s: float
    bytes_per_s: float
    ended_s: float

    def seconds(self, nbytes: int) -> float:
        """Time that it would take for ``nbytes``."""
        return self.first_byte_s + nbytes / self.bytes_per_s


class Cut(NamedTuple):
    """Request that was cut, as it had gone until then.

    Attributes:
        seconds: Time from its start until the cut.
        bytes_per_s: Rate from its first byte on; 0 if it had received nothing.
    """

    seconds: float
    bytes_per_s: float

    def was_in_vain(self, first_byte_s: float, bytes_per_s: float) -> bool:
        """True if the request for the rest fared hardly better, by its first byte and its rate."""
        return bytes_per_s < 2 * self.bytes_per_s if self.bytes_per_s else first_byte_s > self.seconds / 2


class History:
    """Requests of about one size to one server that ended lately.

    Attributes:
        peers: The requests, the newest last.
    """

    __slots__ = ("_appended", "_bytes_per_s", "_first_byte_s", "peers")

    def __init__(self) -> None:
        self.peers: deque[Peer] = deque(maxlen=_PEERS_KEPT)
        self._appended = 0
        self._first_byte_s = 0.0
        self._bytes_per_s = 1.0

    def append(self, peer: Peer) -> None:
        """Add a request that has just ended."""
        self.peers.append(peer)
        if self._appended < _PEERS_PER_LOOK or self._appended % _PEERS_PER_LOOK == 0:
            self._first_byte_s = quantile((each.first_byte_s for each in self.peers), 0.5)
            self._bytes_per_s = quantile((each.bytes_per_s for each in self.peers), 0.5)
        self._appended += 1

    def usual(self) -> Peer:
        """A request as they usually were, as of late; not for an empty history."""
        return Peer(self._first_byte_s, self._bytes_per_s, 0.0)


class Server:
    """Server, by host and port, with its requests in flight and those that ended lately.

    Attributes:
        histories: Its requests that ended lately, by the number of bits of their size.
        served_s: Time at which one of them last brought something, or was sent while there was no other.
        in_flight: Its requests that are in flight, by the part's number, in the order in which they were sent.
    """

    __slots__ = ("histories", "in_flight", "served_s")

    def __init__(self) -> None:
        self.histories: dict[int, History] = {}
        self.served_s = 0.0
        self.in_flight: dict[int, Request] = {}

    def history(self, nbytes: int) -> History:
        """Requests of about ``nbytes`` bytes that ended lately."""
        size_class = nbytes.bit_length()
        history = self.histories.get(size_class)
        if history is None:
            history = self.histories[size_class] = History()
        return history

    def has_served(self, now: float) -> None:
        """Note that one of its requests has brought something, which ends a pause for all, if there was one."""
        pause_s = now - self.served_s
        self.served_s = now
        if pause_s > _LEAST_PAUSE_S and len(self.in_flight) >= _PAUSE_WITNESSES:
            for request in self.in_flight.values():
                request.paused_s += (1 + _RESUMPTION) * min(pause_s, now - request.sent_s)

    def served_until(self, now: float) -> float:
        """Time until which it is known to have served anybody: in a pause for all, no request gets slower.

        With few requests in flight nothing is known of a pause, and it is ``now``.
        """
        return now if len(self.in_flight) < _PAUSE_WITNESSES else self.served_s

    def larger_peers(self, nbytes: int) -> list[Peer]:
        """Requests of about ``nbytes`` bytes, or of more, that ended lately, the newest last.

        Much smaller ones tell nothing: where all bytes come with the first one, there is no rate.
        """
        least_class = nbytes.bit_length() - 1
        histories = [history for size_class, history in self.histories.items() if size_class >= least_class]
        return sorted((peer for history in histories for peer in history.peers), key=lambda peer: peer.ended_s)


class Request:
    """A GET in flight.

    Attributes:
        number: Number of its part.
        server: Its server.
        nbytes: Bytes that it asks for, or less, if it was told to end earlier.
        history: Requests of about its size to its server.
        sent_s: Time at which a worker got it; the worker may begin with it later.
        cuts: Number of times that its part was cut before.
        cut: How the request for its part went that was cut last; None if none was.
        progress: What its worker said of it last; None if nothing.
        reported_s: Time at which that came.
        paused_s: Seconds, since it was sent, in which the server paused for all.
        moved_s: Time at which it was last known to have received something; 0 if it has not.
        bytes_per_s: Rate since its first byte; 0 if none has come.
        is_cut: True once it was decided to cut it.
        halved_s: Time at which it was last told to end earlier; 0 if it was not.
        burst_bytes: Most bytes that have come in a short time.
    """

    __slots__ = (
        "burst_bytes",
        "bytes_per_s",
        "cut",
        "cuts",
        "halved_s",
        "history",
        "is_cut",
        "moved_s",
        "nbytes",
        "number",
        "paused_s",
        "progress",
        "reported_s",
        "sent_s",
        "server",
    )

    def __init__(self, number: int, server: Server, nbytes: int, now: float) -> None:
        self.number = number
        self.server = server
        self.nbytes = nbytes
        self.history = server.history(nbytes)
        self.sent_s = now
        self.cuts = 0
        self.cut: Cut | None = None
        self.progress: PartProgress | None = None
        self.reported_s = now
        self.paused_s = 0.0
        self.moved_s = 0.0
        self.bytes_per_s = 0.0
        self.is_cut = False
        self.halved_s = 0.0
        self.burst_bytes = 0

    def note(self, progress: PartProgress, now: float) -> None:
        """Take a report of its worker."""
        gained = progress.received - self.received
        if gained:
            self.moved_s = now
            self.server.has_served(now)
            if now - (self.reported_s if self.progress is not None else progress.first_byte_s) <= _BURST_S:
                self.burst_bytes = max(self.burst_bytes, gained)
        # Not the rate since the last report: some servers send in bursts, with pauses that are longer than that.
        self.bytes_per_s = progress.received / max(now - progress.first_byte_s, 1e-6) if progress.first_byte_s else 0.0
        self.progress, self.reported_s = progress, now

    @property
    def received(self) -> int:
        """Bytes that it had received when it was last reported."""
        return self.progress.received if self.progress is not None else 0

    @property
    def first_byte_s(self) -> float | None:
        """Seconds until its response began; None if it has not."""
        if self.progress is None or not self.progress.first_byte_s:
            return None
        return self.progress.first_byte_s - self.progress.started_s

    def as_peer(self, least_age_s: float) -> Peer | None:
        """Its rate when it was last reported, as an example for others; None if it was younger, or had no byte."""
        first_byte_s = self.first_byte_s
        if first_byte_s is None or not self.bytes_per_s or self.progress is None:
            return None
        if self.reported_s - self.progress.started_s < least_age_s:
            return None
        return Peer(first_byte_s, self.bytes_per_s, self.reported_s)


class InFlight:
    """All requests in flight. Not thread-safe: owned by the coordinator's thread.

    Attributes:
        requests: The requests by the part's number, in the order in which they were sent.
        asked_s: Time at which the workers were last asked for progress.
    """

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self.asked_s = 0.0
        self._servers: dict[tuple[str, int], Server] = {}

    def sent(self, number: int, server_and_size: ServerAndSize, now: float) -> Request:
        """Note that a worker has got a request for (the rest of) a part; returns it."""
        host, port, nbytes = server_and_size
        server = self._servers.get((host, port))
        if server is None:
            server = self._servers[host, port] = Server()
        if not server.in_flight:
            server.served_s = now
        request = self.requests[number] = server.in_flight[number] = Request(number, server, nbytes, now)
        return request

    def ended(self, number: int) -> Request | None:
        """Forget a request that has ended in any way; returns it, if it was known."""
        request = self.requests.pop(number, None)
        if request is not None:
            del request.server.in_flight[number]
        return request

    def report(self, progress: Iterable[PartProgress], now: float) -> list[Request]:
        """Take a worker's report; returns the requests that it tells of, but for those that are cut."""
        reported = []
        for each in progress:
            request = self.requests.get(each.part)
            # A report that was under way while the request failed, and was sent again, is of the one before.
            if request is not None and not request.is_cut and each.started_s >= request.sent_s:
                request.note(each, now)
                reported.append(request)
        return reported


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which that share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
