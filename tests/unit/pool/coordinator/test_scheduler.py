"""The coordinator's decisions, one at a time: no process and no socket, but the real arena and transfers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mpreader.config import KiB
from mpreader.errors import MpreaderError, TransportError
from mpreader.pool.coordinator.arena import Arena, Lease
from mpreader.pool.coordinator.resolver import Resolved, SourceBook, SourceEntry
from mpreader.pool.coordinator.scheduler import Scheduler, SchedulerLimits
from mpreader.pool.coordinator.state import PartState
from mpreader.pool.source import ObjectVersion
from mpreader.pool.transfer import Demand, Fill, FillPart, Taken, Transfer
from mpreader.pool.worker.messages import Failed, FailureKind
from mpreader.pool.worker.route import Route

pytestmark = pytest.mark.timeout(20)

PART = 64 * KiB


class Local:
    """A source that answers at once. See :class:`mpreader.pool.source.Source`."""

    bucket, key, uri, max_attempts = "bucket", "key", "s3://bucket/key", 3

    def __init__(self) -> None:
        self.error: MpreaderError | None = None

    def open(self) -> ObjectVersion:
        return ObjectVersion(100 * PART, '"etag"')

    def route(self) -> Route:
        if self.error is not None:
            raise self.error
        return Route(False, "host", 80, "/key")


class Bench:
    """A scheduler whose inbox is read, and whose parts are received, when the test says so."""

    def __init__(self, slots: int) -> None:
        self.inbox: list[object] = []
        self.told = threading.Condition()
        self.arena = Arena(slots * PART, PART, PART)
        self.sources = SourceBook(self.tell)
        self.scheduler = Scheduler(self.arena, self.sources, SchedulerLimits(slots * PART, 100.0, 5.0))
        self.source = Local()

    def tell(self, message: object) -> None:
        with self.told:
            self.inbox.append(message)
            self.told.notify_all()

    def wait_for(self, kind: type) -> object:
        """The next message of a kind; applies what sources say meanwhile."""
        with self.told:
            assert self.told.wait_for(lambda: any(isinstance(message, kind) for message in self.inbox), 10)
            message = next(message for message in self.inbox if isinstance(message, kind))
            self.inbox.remove(message)
        return message

    def _end_lease(self, lease: Lease) -> None:
        slot = lease.slot()
        if slot is not None:
            self.scheduler.lease_ended(slot)

    def open(self, count: int) -> Transfer:
        fills = [Fill(self.source, PART, (FillPart(n * PART, (n + 1) * PART, 0),)) for n in range(count)]
        transfer = Transfer(fills, self.tell, self._end_lease)
        is_first = not self.scheduler._readings
        self.scheduler.open(transfer)
        if is_first:
            self.resolve()
        return transfer

    def resolve(self) -> None:
        message = self.wait_for(Resolved)
        assert isinstance(message, Resolved)
        self.sources.apply(message)

    def send(self) -> list[PartState]:
        """All parts that would go to the workers now."""
        return list(iter(lambda: self.scheduler.next_part(0.0), None))

    def receive(self, parts: list[PartState]) -> None:
        for part in parts:
            self.scheduler.fetched(part.number)


@pytest.fixture
def make_bench() -> Iterator[Callable[[int], Bench]]:
    benches: list[Bench] = []

    def make(slots: int) -> Bench:
        benches.append(Bench(slots))
        return benches[-1]

    yield make
    for bench in benches:
        bench.scheduler.fail_everything(TransportError("the test is over"))
        bench.sources.close()
        bench.arena.close()
    benches.clear()


def test_scheduler_reads_transfers_in_turn(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(6)
    first, second = bench.open(10), bench.open(10)
    parts = [(part.fill.reading.transfer, part.fill.index) for part in bench.send()]
    assert parts == [(first, 0), (second, 0), (first, 1), (second, 1), (first, 2), (second, 2)]


def test_scheduler_demand_takes_what_others_have_read_ahead_furthest(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    rich = bench.open(10)
    bench.receive(bench.send())
    assert sorted(rich._arrived) == [0, 1, 2, 3]
    poor = bench.open(10)
    bench.scheduler.demand(poor, 0)
    [part] = bench.send()
    assert part.fill.reading.transfer is poor
    assert sorted(rich._arrived) == [0, 1, 2]


def test_scheduler_demand_never_takes_what_a_consumer_is_about_to_take(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    waiting = bench.open(1)
    taken: list[memoryview] = []
    thread = threading.Thread(target=lambda: taken.append(waiting.take(0)))
    thread.start()
    bench.wait_for(Demand)
    bench.scheduler.demand(waiting, 0)
    with waiting._condition:  # it can't wake up yet
        bench.receive(bench.send())
        other = bench.open(1)
        bench.scheduler.demand(other, 0)
        assert bench.send() == []
    thread.join()
    assert len(taken[0]) == PART
    bench.wait_for(Taken)
    bench.scheduler.taken(waiting, 0)
    taken.clear()
    assert [part.fill.reading.transfer for part in bench.send()] == [other]


def test_scheduler_tries_a_part_again_that_was_cancelled_by_mistake(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    bench.scheduler.failed(Failed(part.number, FailureKind.CANCELLED, 100, "cancelled"), 0.0)
    assert not transfer._arrived
    again = bench.scheduler.next_part(60.0)
    assert again is part
    assert again.received == 100


def test_scheduler_slot_of_a_dropped_part_comes_back_only_when_its_worker_is_done(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    dropped = bench.open(1)
    [part] = bench.send()
    assert bench.scheduler.close(dropped) == [part.number]
    transfer = bench.open(1)
    bench.scheduler.demand(transfer, 0)
    assert bench.send() == [], "a worker may still write into that slot"
    bench.scheduler.failed(Failed(part.number, FailureKind.CANCELLED, 0, "cancelled"), 0.0)
    assert len(bench.send()) == 1


def test_scheduler_that_fails_everything_holds_on_to_nothing(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    transfer = bench.open(5)
    bench.send()
    bench.scheduler.fail_everything(TransportError("broken"))
    assert bench.scheduler.is_idle
    with pytest.raises(TransportError, match="broken"):
        transfer.take(0)


def resolved(bench: Bench) -> SourceEntry:
    entry = bench.sources.use(bench.source)
    bench.resolve()
    return entry


def test_sources_renewal_in_good_time_may_fail(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    entry = resolved(bench)
    bench.source.error = TransportError("no credentials just now")
    bench.sources.renew_if_old(entry, entry.route_made + 10)
    bench.sources.renew_if_old(entry, entry.route_made + 241)
    bench.resolve()
    assert entry.error is None
    assert entry.route is not None


def test_sources_renewal_that_is_needed_may_not_fail(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    entry = resolved(bench)
    bench.source.error = TransportError("no credentials any more")
    bench.sources.renew(entry)
    bench.sources.renew(entry)
    bench.resolve()
    assert entry.error is bench.source.error
    assert not bench.inbox, "it was asked for twice"


def test_sources_forget_an_object_with_its_last_user(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    entry = resolved(bench)
    assert bench.sources.use(bench.source) is entry
    bench.sources.release(entry)
    assert bench.sources.use(bench.source) is entry
    bench.sources.release(entry)
    bench.sources.release(entry)
    assert resolved(bench) is not entry
