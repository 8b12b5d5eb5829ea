"""Which requests in flight end earlier, so that idle connections can take their ends."""

from __future__ import annotations

import pytest

from mpreader.pool.coordinator.halving import Halving
from mpreader.pool.coordinator.in_flight import InFlight
from mpreader.pool.worker.messages import PartProgress

MB = 1_000_000
SERVER = ("server", 443)
BEGAN_S = 100.0


class Requests:
    """Requests that began at one time, and their reports after so many seconds."""

    def __init__(self, *sizes: int) -> None:
        self.in_flight = InFlight()
        self.halving = Halving(self.in_flight)
        for number, nbytes in enumerate(sizes):
            self.in_flight.sent(number, (*SERVER, nbytes), BEGAN_S)

    def report(self, seconds: float, *received: int, first_byte_s: float = 0.01) -> float:
        """Let a worker report each request; returns the time."""
        began = BEGAN_S + first_byte_s
        parts = [PartProgress(number, nbytes, BEGAN_S, began) for number, nbytes in enumerate(received)]
        self.in_flight.report(parts, BEGAN_S + seconds)
        return BEGAN_S + seconds


def test_request_that_would_end_last_gives_half_of_its_rest() -> None:
    requests = Requests(8 * MB, 16 * MB, 8 * MB)
    half = requests.halving.choose(requests.report(1.01, 2 * MB, 2 * MB, 2 * MB))
    assert half is not None
    assert half.part == 1
    # 14 MB are left: half of it, but for what comes in the 10 ms before the new request has its first byte.
    assert half.nbytes == pytest.approx(7 * MB, rel=0.01)


def test_slow_request_keeps_less_than_a_faster_one_takes() -> None:
    requests = Requests(16 * MB, 16 * MB, 16 * MB)
    half = requests.halving.choose(requests.report(1.01, 1 * MB, 3 * MB, 3 * MB))
    assert half is not None
    assert half.part == 0
    assert half.nbytes == pytest.approx(15 * MB * 3 / 4, rel=0.01)


def test_request_is_halved_again_only_after_more_has_come() -> None:
    requests = Requests(64 * MB)
    now = requests.report(1.01, 2 * MB)
    half = requests.halving.choose(now)
    assert half is not None
    requests.halving.halved(half, now)
    assert requests.halving.choose(now) is None
    assert requests.halving.choose(requests.report(1.06, 2 * MB)) is None, "nothing has come"
    again = requests.halving.choose(requests.report(1.11, 2 * MB + MB // 10))
    assert again is not None
    assert again.nbytes < half.nbytes


@pytest.mark.parametrize(
    ("size", "seconds", "received"),
    [
        pytest.param(8 * MB, 0.06, 6 * MB, id="it ends soon"),
        pytest.param(400_000, 1.01, 10_000, id="halves would be too small"),
        pytest.param(8 * MB, 0.03, 10_000, id="nothing is known of its rate yet"),
        pytest.param(8 * MB, 1.01, 0, id="nothing has come"),
        # All of it came at once, and so may the rest: it would be past its new end before it knows of it.
        pytest.param(8 * MB, 0.15, 5 * MB, id="it comes in bursts"),
    ],
)
def test_request_is_left_alone(size: int, seconds: float, received: int) -> None:
    requests = Requests(size)
    assert requests.halving.choose(requests.report(seconds, received)) is None


def test_request_whose_first_bytes_come_late_is_left_alone() -> None:
    requests = Requests(8 * MB)
    # A new request would bring nothing before this one has ended.
    assert requests.halving.choose(requests.report(5.0, 7 * MB, first_byte_s=4.0)) is None


def test_request_that_is_cut_is_left_alone() -> None:
    requests = Requests(64 * MB)
    now = requests.report(1.01, 2 * MB)
    requests.in_flight.requests[0].is_cut = True
    assert requests.halving.choose(now) is None


def test_workers_are_asked_only_while_a_request_is_large_enough() -> None:
    requests = Requests(8 * MB)
    assert BEGAN_S < requests.halving.next_look() < BEGAN_S + 0.1
    requests.report(1.0, 8 * MB - 1000)
    assert requests.halving.next_look() == float("inf")
    requests.in_flight.ended(0)
    assert requests.halving.next_look() == float("inf")
