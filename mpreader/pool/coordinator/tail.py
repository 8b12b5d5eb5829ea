"""Slow tail: finds the requests that are much slower than their peers, so that their rest is requested again.

Used by the coordinator, in its thread, which sends what is decided here. It sends nothing, and knows neither reads nor
workers; what it knows of requests is in :mod:`~mpreader.pool.coordinator.in_flight`.

Object stores answer one request in fifty a hundred times more slowly than the others. Such a request is *cut*: its
connection is closed, and the bytes that it has not brought are requested on another one. What is slow is never a fixed
number. A request is compared with its *peers*: requests of about its size to the same server that ended since it began,
and those that are in flight with it; where these are too few, with the ones that ended before.

::

    the oldest request is older than its peers usually get ──► ask the workers for the progress of all
      ──► its first byte is late, or at its present rate its rest would take several times as long as a new request
      ──► others have received bytes for so long, or hardly any others are left       (else the server pauses for all)
      ──► the budget has a cut left        (successes refill it: a server that is overloaded is not asked much more)
      ──► cut it
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from mpreader.pool.coordinator.in_flight import Cut, InFlight, Peer, Request, Server, ServerAndSize, quantile
from mpreader.pool.worker.messages import PartProgress

__all__ = ["SlowTail"]

# With fewer peers than this nothing is known: a request is compared with older ones, or left alone.
_LEAST_PEERS: Final = 3
# Of those in flight no more are looked at: the oldest, which are told apart best.
_MOST_PEERS: Final = 64
# Those older ones are few, so that a server that becomes slow for all is soon known as such.
_OLDER_PEERS: Final = 16
# A request is slow if its rest would take so many times as long as a new request for it usually does.
_SLOWNESS: Final = 3.0
# But not before it took so many times as long as they usually do: some bring most of their bytes at the end.
_OVERTIME: Final = 1.5
# Its first byte is late after so many times the time within which nine of ten others had theirs.
_LATENESS: Final = 3.0
# A pause of the server for all is waited for, for so many times as long as for one slow request, and no less than this.
# Then one request is cut, to see whether a new one fares better.
_PAUSE_PATIENCE: Final = 8.0
_LEAST_PAUSE_S: Final = 1.0
# Cuts that a success adds to the budget, and a second, for what is in flight when nothing else is left that could
# succeed. It never holds more than a share of the connections.
_BUDGET_PER_SUCCESS: Final = 0.1
_BUDGET_PER_S: Final = 0.5
_BUDGET_PER_CONNECTION: Final = 0.25
# Each cut that was in vain, since the rest came as slowly, doubles the patience with that server, up to this.
_MOST_PATIENCE: Final = 64.0
# A younger request is never cut: on a busy host each may wait for a processor for some time. A body that has come for a
# shorter time says nothing of its rate.
_LEAST_AGE_S: Final = 0.05
# Shortest and longest time between two questions for progress.
_SHORTEST_LOOK_S: Final = 0.02
_LONGEST_LOOK_S: Final = 1.0


class _Allowance:
    """Cuts that a server may see.

    Attributes:
        budget: Cuts that may be made now.
        patience: Factor of all waits; more than 1 after cuts that were in vain.
    """

    __slots__ = ("budget", "patience")

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.patience = 1.0


class SlowTail:
    """Decides which requests are cut. Not thread-safe: owned by the coordinator's thread.

    Args:
        connections: Most connections, of all workers together. They bound how many requests are cut at one time.

    Attributes:
        in_flight: The requests that are in flight.
    """

    def __init__(self, connections: int) -> None:
        self._most_budget = max(2.0, _BUDGET_PER_CONNECTION * connections)
        self._allowances: dict[Server, _Allowance] = {}
        self.in_flight = InFlight()

    def sent(
        self, number: int, server_and_size: ServerAndSize, now: float, *, cuts: int = 0, cut: Cut | None = None
    ) -> None:
        """Note that a worker has got a request for (the rest of) a part.

        Args:
            number: Number of the part.
            server_and_size: Host, port, and bytes that the request asks for.
            now: Monotonic time.
            cuts: Requests for the part that were cut before.
            cut: How the last one of them went; None if there was none.
        """
        request = self.in_flight.sent(number, server_and_size, now)
        request.cuts, request.cut = cuts, cut
        if request.server not in self._allowances:
            self._allowances[request.server] = _Allowance(self._most_budget)

    def fetched(self, number: int, seconds: float, first_byte_s: float, now: float) -> None:
        """Learn from a request that brought all its bytes.

        Args:
            number: Number of the part.
            seconds: Time from its start until its last byte.
            first_byte_s: Time from its start until its first byte.
            now: Monotonic time.
        """
        request = self.in_flight.ended(number)
        if request is None:
            return
        bytes_per_s = request.nbytes / max(seconds - first_byte_s, 1e-6)
        request.history.append(Peer(first_byte_s, bytes_per_s, now))
        request.server.has_served(now)
        allowance = self._allowances[request.server]
        allowance.budget = min(self._most_budget, allowance.budget + _BUDGET_PER_SUCCESS)
        if request.cut is not None:
            factor = 2.0 if request.cut.was_in_vain(first_byte_s, bytes_per_s) else 0.5
            allowance.patience = min(_MOST_PATIENCE, max(1.0, allowance.patience * factor))

    def ended(self, number: int) -> None:
        """Forget a request that failed or was cut, or whose worker died."""
        self.in_flight.ended(number)

    def next_look(self) -> float:
        """Time, by the monotonic clock, to ask for the progress of all requests; infinite if there are none."""
        oldest = next(iter(self.in_flight.requests.values()), None)
        if oldest is None:
            return float("inf")
        asked_s = self.in_flight.asked_s
        if len(oldest.history.peers) < _LEAST_PEERS:
            # Nothing is known: the first requests are compared with each other, more and more rarely.
            interval_s = max(asked_s - oldest.sent_s, 2 * _SHORTEST_LOOK_S) / 2
            due = oldest.sent_s + 2 * _SHORTEST_LOOK_S
        else:
            usual_s = oldest.history.usual().seconds(oldest.nbytes)
            interval_s, due = usual_s / 2, oldest.sent_s + usual_s
        return max(due, asked_s + min(_LONGEST_LOOK_S, max(_SHORTEST_LOOK_S, interval_s)))

    def looked(self, now: float) -> None:
        """Note that the workers are asked for progress now."""
        refill = _BUDGET_PER_S * min(_LONGEST_LOOK_S, now - self.in_flight.asked_s)
        for allowance in self._allowances.values():
            allowance.budget = min(self._most_budget, allowance.budget + refill)
        self.in_flight.asked_s = now

    def judge(self, progress: Iterable[PartProgress], now: float) -> list[int]:
        """Take a worker's report; returns the numbers of the parts to cut."""
        reported = self.in_flight.report(progress, now)
        # The slowest first, in case that the budget does not last for all.
        reported.sort(key=lambda request: request.bytes_per_s)
        cut = []
        for request in reported:
            allowance = self._allowances[request.server]
            if allowance.budget >= 1 and self._is_slow(request, allowance.patience, now):
                allowance.budget -= 1
                request.is_cut = True
                cut.append(request.number)
        return cut

    def _is_slow(self, request: Request, patience: float, now: float) -> bool:
        progress = request.progress
        assert progress is not None, "only requests that were reported are judged"
        is_known = len(request.history.peers) >= _LEAST_PEERS
        if is_known and now - progress.started_s <= request.history.usual().seconds(request.nbytes):
            return False  # most are younger, and need no closer look
        others = [each for each in request.server.in_flight.values() if each is not request]
        peers = _peers(request, others, now)
        if len(peers) < _LEAST_PEERS:
            return False
        usual_s = quantile((peer.seconds(request.nbytes) for peer in peers), 0.5)
        patience *= 2.0**request.cuts
        clock_s = request.server.served_until(now)
        if now - clock_s > max(_LEAST_PAUSE_S, _PAUSE_PATIENCE * patience * usual_s):
            if any(each.cuts or each.is_cut for each in others):
                return False  # one was cut already, and its new request fares no better
            clock_s = now
        return _is_behind(request, progress, peers, usual_s, patience, clock_s)


def _is_behind(
    request: Request, progress: PartProgress, peers: list[Peer], usual_s: float, patience: float, clock_s: float
) -> bool:
    """True if a request, by its last report, is much slower than its peers were, which usually took ``usual_s``."""
    age_s = clock_s - progress.started_s - request.paused_s
    if age_s < _LEAST_AGE_S:
        return False
    if request.first_byte_s is None:
        late_s = _LATENESS * quantile((peer.first_byte_s for peer in peers), 0.9)
        return age_s > patience * max(late_s, usual_s)
    if age_s <= patience * _OVERTIME * usual_s or clock_s - progress.first_byte_s < _LEAST_AGE_S:
        return False
    left = request.nbytes - progress.received
    slow_s = patience * _SLOWNESS * quantile((peer.seconds(left) for peer in peers), 0.5)
    silent_s = clock_s - max(request.moved_s, progress.first_byte_s) - request.paused_s
    # The second one: if it fell silent near its end, its rate since the first byte says little.
    return left > slow_s * request.bytes_per_s or silent_s > max(slow_s, patience * usual_s)


def _peers(request: Request, others: list[Request], now: float) -> list[Peer]:
    assert request.progress is not None, "only requests that were reported are judged"
    started_s, history = request.progress.started_s, request.history.peers
    # Of a much younger one the rate says little: perhaps it is about to pause, as this one does.
    least_age_s = (now - started_s) / 2
    peers = [peer for each in others[:_MOST_PEERS] if (peer := each.as_peer(least_age_s)) is not None]
    peers += [peer for peer in history if peer.ended_s > started_s]
    if len(peers) >= _LEAST_PEERS:
        return peers
    # Few others are left, or a part that was cut is requested again: what was known before has to do.
    older = [*history] if len(history) >= _LEAST_PEERS else request.server.larger_peers(request.nbytes)
    return [*peers, *older[-_OLDER_PEERS:]]
