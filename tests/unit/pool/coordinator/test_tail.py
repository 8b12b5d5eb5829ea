"""A simulated server and simulated connections: which requests are cut, and what that brings."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import pytest

from mpreader.pool.coordinator.in_flight import Cut
from mpreader.pool.coordinator.tail import SlowTail
from mpreader.pool.worker.messages import PartProgress

PART = 8 << 20


class Answer(NamedTuple):
    """How the server answers a request."""

    first_byte_s: float
    bytes_per_s: float
    silent_after: float = float("inf")  # bytes after which nothing more comes


class Part(NamedTuple):
    """A part, or the rest of one."""

    number: int
    nbytes: int
    cuts: int = 0
    cut: Cut | None = None

    def rest(self, request: Request, now: float) -> Part:
        """What is to be requested again after a cut."""
        rate = request.received / max(now - request.first_byte_s, 1e-6)
        cut = Cut(now - request.started_s, rate if request.received else 0.0)
        return Part(self.number, self.nbytes - int(request.received), self.cuts + 1, cut)


@dataclass
class Request:
    part: Part
    answer: Answer
    started_s: float
    served_s: float = 0.0  # time in which the server served it, pauses left out
    received: float = 0.0
    first_byte_s: float = 0.0

    def serve(self, seconds: float, now: float) -> None:
        self.served_s += seconds
        body_s = self.served_s - self.answer.first_byte_s
        if body_s > 0:
            self.first_byte_s = self.first_byte_s or now
            self.received = min(self.part.nbytes, self.answer.silent_after, body_s * self.answer.bytes_per_s)


@dataclass
class Load:
    """A load of parts of one size over some connections, in small steps of time.

    Attributes:
        seconds: Time that it has taken.
        cuts: Numbers of the parts that were cut, in order.
        looks: Times at which the progress was asked for.
    """

    answer: Callable[[], Answer]
    parts: int = 150
    nbytes: int = PART
    connections: int = 32
    pauses: tuple[tuple[float, float], ...] = ()
    tail: SlowTail = field(default_factory=lambda: SlowTail(32))
    is_cutting: bool = True
    step_s: float = 0.002
    began_s: float = 1000.0
    server: str = "server"
    seconds: float = 0.0
    cuts: list[int] = field(default_factory=list)
    looks: int = 0

    def run(self) -> Load:
        queue = deque(Part(number, self.nbytes) for number in range(self.parts))
        flying: dict[int, Request] = {}
        now = self.began_s
        while queue or flying:
            while queue and len(flying) < self.connections:
                part = queue.popleft()
                flying[part.number] = Request(part, self.answer(), now)
                size = (self.server, 443, part.nbytes)
                self.tail.sent(part.number, size, now, cuts=part.cuts, cut=part.cut)
            now += self.step_s
            for request in flying.values():
                # After a pause one request after the other is served again.
                resumed_s = now - self.began_s - request.part.number % 20 / 100
                if not any(start <= resumed_s < end or start <= now - self.began_s < end for start, end in self.pauses):
                    request.serve(self.step_s, now)
            for request in [each for each in flying.values() if each.received >= each.part.nbytes]:
                del flying[request.part.number]
                first_byte_s = request.first_byte_s - request.started_s
                self.tail.fetched(request.part.number, now - request.started_s, first_byte_s, now)
            if self.is_cutting and now >= self.tail.next_look():
                self._look(flying, queue, now)
            assert now < self.began_s + 1000, "the load does not end"
        self.seconds = now - self.began_s
        return self

    def _look(self, flying: dict[int, Request], queue: deque[Part], now: float) -> None:
        self.looks += 1
        self.tail.looked(now)
        reports = [PartProgress(r.part.number, int(r.received), r.started_s, r.first_byte_s) for r in flying.values()]
        for number in self.tail.judge(reports, now):
            request = flying.pop(number)
            self.tail.ended(number)
            self.cuts.append(number)
            queue.appendleft(request.part.rest(request, now))


def steady(bytes_per_s: float, first_byte_s: float = 0.03) -> Callable[[], Answer]:
    rng = random.Random(1)
    return lambda: Answer(first_byte_s * rng.uniform(0.7, 1.5), bytes_per_s * rng.uniform(0.8, 1.1))


Slow = Callable[[random.Random], Answer]


def mixed(share: float, slow: Slow, seed: int) -> Callable[[], Answer]:
    rng, fast = random.Random(seed), steady(90e6)
    return lambda: slow(rng) if rng.random() < share else fast()


FAST = Load(steady(90e6), is_cutting=False).run()


@pytest.mark.parametrize(
    ("share", "slow"),
    [
        pytest.param(0.02, lambda _: Answer(0.03, 200e3), id="2 % at 200 kB/s"),
        pytest.param(0.02, lambda _: Answer(0.03, 9e6), id="2 % at a tenth of the rate"),
        pytest.param(0.01, lambda _: Answer(5.0, 90e6), id="1 % wait 5 s"),
        pytest.param(0.01, lambda rng: Answer(0.03, 90e6, rng.random() * PART), id="1 % fall silent"),
        pytest.param(0.01, lambda _: Answer(0.03, 90e6, PART - 1000), id="1 % fall silent just before the end"),
        pytest.param(0.01, lambda _: Answer(1e9, 90e6), id="1 % never answer"),
    ],
)
def test_tail_is_cut_and_costs_little(share: float, slow: Slow) -> None:
    loads = [Load(mixed(share, slow, seed)).run() for seed in range(5)]
    assert median(load.seconds for load in loads) < 1.3 * FAST.seconds
    # The worst: the last parts are slow, so that no other work hides it, perhaps even twice in a row.
    assert max(load.seconds for load in loads) < 2.2 * FAST.seconds
    assert sum(len(load.cuts) for load in loads)


def test_tail_of_small_requests_is_cut_when_their_first_byte_is_late() -> None:
    fast = Load(steady(90e6), 3000, 64 << 10, is_cutting=False).run()
    load = Load(mixed(0.01, lambda _: Answer(5.0, 90e6), 1), 3000, 64 << 10).run()
    assert load.seconds < 1.3 * fast.seconds


@pytest.mark.parametrize("bytes_per_s", [90e6, 2e6, 200e3])
def test_server_that_serves_all_alike_sees_no_cuts(bytes_per_s: float) -> None:
    load = Load(steady(bytes_per_s), step_s=min(0.02, 1e5 / bytes_per_s)).run()
    assert load.cuts == []
    # At the least every second, and about ten times in a short load.
    assert load.looks < 10 + 1.1 * load.seconds


def test_rates_that_scatter_widely_see_few_cuts() -> None:
    rng = random.Random(3)
    load = Load(lambda: Answer(rng.expovariate(20), 90e6 * rng.lognormvariate(0, 0.5))).run()
    assert len(load.cuts) <= 3


@pytest.mark.parametrize("connections", [32, 8])
def test_server_that_becomes_slow_for_all_sees_no_cuts_in_vain(connections: int) -> None:
    tail = SlowTail(32)
    Load(steady(90e6), tail=tail).run()
    load = Load(steady(9e6), parts=100, connections=connections, tail=tail, began_s=2000.0).run()
    assert load.cuts == []


def test_long_pauses_of_the_whole_server_see_one_cut_each() -> None:
    pauses = ((0.5, 3.5), (4.5, 7.5))
    load = Load(steady(90e6), parts=600, pauses=pauses).run()
    assert load.seconds < Load(steady(90e6), parts=600, is_cutting=False).run().seconds + 6.8
    # After a second of each pause, one request is cut: a new one may fare better.
    assert len(load.cuts) <= 2


def test_short_pauses_of_the_whole_server_see_no_cuts() -> None:
    load = Load(steady(90e6), parts=600, pauses=((0.5, 1.2), (1.6, 2.3), (2.6, 3.3))).run()
    assert load.cuts == []


@pytest.mark.parametrize("slow", [Answer(2.0, 90e6), Answer(0.03, 1e6)], ids=["late", "far below"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_cuts_are_bounded_by_the_budget_where_many_requests_are_slow(share: float, slow: Answer) -> None:
    load = Load(mixed(share, lambda _: slow, 1)).run()
    assert len(load.cuts) <= 8 + 0.1 * load.parts + 0.5 * load.seconds


def test_cuts_in_vain_become_rare() -> None:
    tail, fast, slow = SlowTail(32), steady(90e6), Answer(0.03, 9e6)
    Load(fast, tail=tail).run()
    known_cuts, numbers = [0], itertools.count()

    def answer() -> Answer:
        if len(load.cuts) > known_cuts[-1]:  # the rest of a part that was cut comes as slowly
            known_cuts.append(len(load.cuts))
            return slow
        return fast() if next(numbers) % 5 else slow

    load = Load(answer, parts=100, connections=1, tail=tail, began_s=2000.0)
    load.run()
    assert len(load.cuts) <= 5, "of twenty parts that are slow however often they are requested"


def test_next_load_knows_what_is_slow_from_the_last_one() -> None:
    tail = SlowTail(32)
    Load(steady(90e6), tail=tail).run()
    # Two parts only: too few to be compared with each other.
    answers = iter([Answer(0.03, 90e6), Answer(0.03, 200e3), Answer(0.03, 90e6)])
    load = Load(lambda: next(answers), parts=2, tail=tail, began_s=2000.0).run()
    assert load.cuts == [1]
    assert load.seconds < 1.0


def test_slow_server_is_not_compared_with_another_one() -> None:
    tail = SlowTail(32)
    Load(steady(90e6), tail=tail, server="fast").run()
    # One part only, so that it would be compared with what ended before.
    assert Load(steady(2e6), parts=1, tail=tail, began_s=2000.0, server="slow").run().cuts == []


def test_large_request_is_not_compared_with_small_ones_whose_bytes_come_with_the_first() -> None:
    tail, answer = SlowTail(32), steady(10e6, first_byte_s=0.001)
    Load(answer, parts=300, nbytes=1000, tail=tail).run()
    assert Load(answer, parts=2, tail=tail, began_s=2000.0).run().cuts == []


def test_rest_of_a_request_is_compared_with_larger_ones() -> None:
    tail = SlowTail(32)
    Load(steady(90e6), tail=tail).run()
    Load(steady(90e6), parts=300, nbytes=1000, tail=tail, began_s=2000.0).run()
    answers = iter([Answer(1e9, 90e6), Answer(0.03, 90e6)])
    assert Load(lambda: next(answers), parts=1, nbytes=PART // 5, tail=tail, began_s=3000.0).run().cuts == [0]


def test_report_of_a_request_that_was_sent_again_meanwhile_is_left_out() -> None:
    tail = SlowTail(32)
    Load(steady(90e6), tail=tail).run()
    size = ("server", 443, PART)
    tail.sent(1, size, 2000.0)
    late = PartProgress(1, 0, 2000.001, 0.0)
    tail.ended(1)
    tail.sent(1, size, 2004.9)
    assert tail.judge([late], 2005.0) == []
    assert tail.judge([PartProgress(1, 0, 2004.901, 0.0)], 2010.0) == [1]


@pytest.mark.parametrize(
    ("cut", "first_byte_s", "bytes_per_s", "was_in_vain"),
    [
        (Cut(1.0, 1e6), 0.1, 1.5e6, True),
        (Cut(1.0, 1e6), 0.1, 3e6, False),
        (Cut(1.0, 0.0), 0.9, 90e6, True),
        (Cut(1.0, 0.0), 0.1, 90e6, False),
    ],
)
def test_cut_was_in_vain_where_the_new_request_fares_no_better(
    cut: Cut, first_byte_s: float, bytes_per_s: float, was_in_vain: bool
) -> None:
    assert cut.was_in_vain(first_byte_s, bytes_per_s) is was_in_vain
