"""Halving: lets idle connections take what large requests in flight have not received yet.

Used by the coordinator, in its thread, when nothing is left to be sent: at the end of a load, or in a fetch of one
large range. A request keeps its connection and goes on, but ends earlier; the bytes from there on become a part of
their own. It sends nothing, and knows neither reads nor workers.

What is gained is estimated by rates: a new connection has its first byte as late as others had it, and receives as
fast from then on. The two should end at the same time.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from mpreader.pool.coordinator.in_flight import InFlight, Peer, Request, quantile

__all__ = ["Half", "Halving"]

# A request is halved only if that saves so many seconds, and this share of the time that it would still take: what it
# costs is a connection, since the one that ends in the middle of a response must be closed.
_LEAST_GAIN_S: Final = 0.1
_LEAST_GAIN: Final = 0.2
# No half is smaller: a request costs a server more than so many bytes. What is left for a request is no smaller than a
# burst of it: it would be past its new end before it knows of that, and these bytes would be received twice.
_LEAST_BYTES: Final = 256 * 1024
# A body that has come for a shorter time says nothing of its rate.
_LEAST_BODY_S: Final = 0.05
# Time between two questions for progress while connections are idle.
_LOOK_S: Final = 0.05


class Half(NamedTuple):
    """A request that is to end earlier.

    Attributes:
        part: Number of its part.
        nbytes: Bytes of the part, from its end, that another request takes.
    """

    part: int
    nbytes: int


class Halving:
    """Chooses which requests end earlier. Not thread-safe: owned by the coordinator's thread.

    Args:
        in_flight: The requests that are in flight.
    """

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def next_look(self) -> float:
        """Time, by the monotonic clock, to ask for the progress of all requests, while connections are idle.

        Infinite if no request is large enough.
        """
        if all(_left_bytes(request) < 2 * _LEAST_BYTES for request in self._in_flight.requests.values()):
            return float("inf")
        oldest = next(iter(self._in_flight.requests.values()))
        return max(self._in_flight.asked_s, oldest.sent_s) + _LOOK_S

    def choose(self, now: float) -> Half | None:
        """The request that would end last, if it ends notably earlier by the help of one more connection; else None."""
        last = max(self._in_flight.requests.values(), key=lambda request: _left_s(request, now), default=None)
        if last is None or not _left_s(last, now):
            return None
        anew = _new_request(last)
        left_bytes, left_s = _left_bytes(last, now), _left_s(last, now)
        # Both end at the same time: nbytes / rate of the new one, after its first byte, as the others at the old rate.
        rates = last.bytes_per_s + anew.bytes_per_s
        nbytes = int((left_s - anew.first_byte_s) * last.bytes_per_s * anew.bytes_per_s / rates)
        gain_s = nbytes / last.bytes_per_s
        if nbytes < _LEAST_BYTES or left_bytes - nbytes < max(_LEAST_BYTES, last.burst_bytes):
            return None
        if gain_s < max(_LEAST_GAIN_S, _LEAST_GAIN * left_s):
            return None
        return Half(last.number, nbytes)

    def halved(self, half: Half, now: float) -> None:
        """Note that a request was told to end earlier. It is not chosen again before more of it has come."""
        request = self._in_flight.requests[half.part]
        request.nbytes -= half.nbytes
        request.halved_s = now


def _left_bytes(request: Request, now: float | None = None) -> int:
    """Bytes that it has not received: when it was last reported, or, as it seems, ``now``."""
    since_s = 0.0 if now is None else now - request.reported_s
    return max(0, request.nbytes - request.received - int(since_s * request.bytes_per_s))


def _left_s(request: Request, now: float) -> float:
    """Seconds that its rest will take; 0 if that is not known."""
    progress = request.progress
    if request.is_cut or progress is None or not request.bytes_per_s or request.halved_s >= request.moved_s:
        return 0.0
    if request.reported_s - progress.first_byte_s < _LEAST_BODY_S:
        return 0.0
    return _left_bytes(request, now) / request.bytes_per_s


def _new_request(last: Request) -> Peer:
    """A new request, as the others to the same server lead to expect it."""
    peers = [peer for each in last.server.in_flight.values() if (peer := each.as_peer(_LEAST_BODY_S)) is not None]
    peers += last.history.peers or last.server.larger_peers(last.nbytes)
    first_byte_s = quantile((peer.first_byte_s for peer in peers), 0.5)
    return Peer(first_byte_s, quantile((peer.bytes_per_s for peer in peers), 0.5), 0.0)
