"""The scheduler's decisions, one at a time: no process and no socket, but the real arena, caller and transfers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from mpreader.config import KiB
from mpreader.errors import (
    AccessDenied,
    ArenaExhausted,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PoolClosed,
    PoolTimeout,
    TransportError,
)
from mpreader.pool.caller import Caller
from mpreader.pool.coordinator import routes
from mpreader.pool.coordinator.arena import Arena
from mpreader.pool.coordinator.memory import SlotMemory
from mpreader.pool.coordinator.scheduler import Scheduler, SchedulerLimits
from mpreader.pool.coordinator.state import PartState, PartStatus, ReadState, SlotReadState, SlotStatus
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    Ended,
    GiveBack,
    OpenRead,
    ReadId,
    SlotRead,
    SlotTaken,
    SourceName,
    SourceResolved,
)
from mpreader.pool.source import ObjectVersion, Refusal
from mpreader.pool.transfer import PendingTake, Transfer
from mpreader.pool.worker.messages import Failed, FailureKind, MapSegment
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part
from mpreader.sources.versions import PinnedSource

pytestmark = pytest.mark.timeout(20)

PART = 64 * KiB
LEASE_TIMEOUT_S = 5.0


class Local:
    """A source that answers at once. See :class:`mpreader.pool.source.Source`."""

    bucket, key, uri, max_attempts = "bucket", "key", "s3://bucket/key", 3
    version = None

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
        self.memory = SlotMemory(self.arena)
        limits = SchedulerLimits(slots * PART, 100.0, LEASE_TIMEOUT_S)
        self.caller = Caller(1, self.tell)
        self.scheduler = Scheduler(self.memory, lambda _: self.caller.post, limits)
        self.source = Local()

    def tell(self, message: object) -> None:
        with self.told:
            self.inbox.append(message)
            self.told.notify_all()

    def read_inbox(self) -> None:
        """Let the scheduler hear all that was said so far, and answer."""
        handlers: dict[type, Callable[..., object]] = {
            CloseRead: self.scheduler.close,
            Demand: self.scheduler.demand,
            Discard: self.scheduler.discard,
            GiveBack: self.scheduler.give_back,
            OpenRead: self.scheduler.open,
            SlotTaken: self.scheduler.slot_taken,
            SourceResolved: self.scheduler.source_resolved,
        }
        collected = self.caller.collect()
        while self.inbox:
            message = self.inbox.pop(0)
            handlers[type(message)](message)
        for each in collected:
            self.scheduler.give_back(each)

    def wait_for(self, kind: type) -> None:
        """Wait until a message of this kind is in the inbox."""
        with self.told:
            assert self.told.wait_for(lambda: any(isinstance(message, kind) for message in self.inbox), 60)

    def open(self, count: int, *, parts: int = 1, grows: bool = False) -> Transfer:
        """Begin a read of ``count`` slot reads, each of so many parts."""
        size = parts * PART
        slot_reads = []
        for start in range(0, count * size, size):
            offsets = range(0, size, PART)
            slot_parts = (Part(start + offset, start + offset + PART, slot_offset=offset) for offset in offsets)
            slot_reads.append(SlotRead(0, size, tuple(slot_parts)))
        transfer, message = self.caller.open([self.source], slot_reads, grows=grows)
        self.tell(message)
        self.read_inbox()  # asks for the source, and hears of it at once if the answer is quick
        [source] = self.scheduler._reads[transfer.read].sources
        if source.route is None and source.error is None:
            self.wait_for(SourceResolved)
            self.read_inbox()
        return transfer

    def send(self, now: float = 0.0) -> list[PartState]:
        """All parts that would go to the workers now."""
        parts: list[PartState] = []
        self.read_inbox()
        while (part := self.scheduler.next_part(now)) is not None or self.inbox:
            self.read_inbox()
            parts += [] if part is None else [part]
        made, _ = self.arena.take_changes()
        for segment in made:
            self.caller.post(MapSegment(segment.number, segment.size), segment)
        return parts

    def receive(self, parts: list[PartState]) -> None:
        for part in parts:
            self.scheduler.fetched(part.number)

    def first(self, transfer: Transfer) -> SlotReadState:
        return self.scheduler._reads[transfer.read].slot_reads[0]


def reads_of(parts: list[PartState]) -> list[tuple[ReadId, int]]:
    return [(part.slot_read.read.id, part.slot_read.index) for part in parts]


def arrived(transfer: Transfer) -> list[int]:
    return sorted(transfer._arrived)


@pytest.fixture
def make_bench() -> Iterator[Callable[[int], Bench]]:
    benches: list[Bench] = []

    def make(slots: int) -> Bench:
        benches.append(Bench(slots))
        return benches[-1]

    yield make
    for bench in benches:
        bench.scheduler.clear()
        bench.caller.post(Ended(TransportError("the test is over")))
        bench.arena.close()
    benches.clear()


def test_scheduler_reads_transfers_in_turn(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(6)
    first, second = bench.open(10), bench.open(10)
    one, two = first.read, second.read
    assert reads_of(bench.send()) == [(one, 0), (two, 0), (one, 1), (two, 1), (one, 2), (two, 2)]


def test_scheduler_demand_takes_what_others_have_read_ahead_furthest(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    rich = bench.open(10)
    bench.receive(bench.send())
    assert arrived(rich) == [0, 1, 2, 3]
    poor = bench.open(10)
    poor.begin_take((0,))
    assert reads_of(bench.send()) == [(poor.read, 0)]
    assert arrived(rich) == [0, 1, 2]


def test_scheduler_reads_again_what_it_has_recalled(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    rich, poor = bench.open(1), bench.open(1)
    bench.receive(bench.send())
    take = poor.begin_take((0,))
    bench.receive(bench.send())
    _, view = poor.result(take)
    assert arrived(rich) == []
    del view
    assert reads_of(bench.send()) == [(rich.read, 0)]


def test_scheduler_demand_for_much_memory_gets_all_that_is_recalled(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(4)
    rich = bench.open(10)
    bench.receive(bench.send())
    assert arrived(rich) == [0, 1, 2, 3]
    poor = bench.open(1, parts=3)
    take = poor.begin_take((0,))
    assert reads_of(bench.send()) == [(poor.read, 0)] * 3, "what was recalled for it went to others"
    assert not take.is_done


def test_scheduler_error_reaches_everybody_who_waits_for_it(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(2)
    takes = [transfer.begin_take((0,)), transfer.begin_take((0, 1)), transfer.begin_take((0,))]
    [part] = bench.send()
    bench.scheduler.failed(Failed(part.number, FailureKind.MISSING, 0, "HTTP 404"), 0.0)
    for take in takes:
        with pytest.raises(ObjectMissing):
            transfer.result(take)


def test_scheduler_never_recalls_what_a_consumer_is_about_to_take(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    waiting, other = bench.open(1), bench.open(1)
    take = waiting.begin_take((0,))
    bench.receive(bench.send())
    assert take.is_done, "it has arrived, and was not taken yet"
    other.begin_take((0,))
    assert bench.send() == []
    _, view = waiting.result(take)
    assert len(view) == PART
    del view
    assert reads_of(bench.send()) == [(other.read, 0)]


def test_scheduler_take_that_is_cancelled_gives_the_slot_to_others(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    waiting, other = bench.open(1), bench.open(1)
    take = waiting.begin_take((0,))
    bench.receive(bench.send())
    other.begin_take((0,))
    waiting.cancel(take)
    assert reads_of(bench.send()) == [(other.read, 0)]


def test_slot_that_arrives_while_a_collection_closes_its_read_is_given_back(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    dropped, other = bench.open(1), bench.open(1)

    class Collected(list[PendingTake]):
        def __iter__(self) -> Iterator[PendingTake]:
            dropped._pending = []
            dropped.close()  # as the finalizer of its stream does; whatever is allocated may collect garbage
            return super().__iter__()

    dropped._pending = Collected()
    bench.receive(bench.send())
    other.begin_take((0,))
    assert reads_of(bench.send()) == [(other.read, 0)]


def test_close_that_is_interrupted_can_be_called_again(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    closed, other = bench.open(2), bench.open(2)
    bench.receive(bench.send())
    on_close = closed._on_close

    def interrupted(transfer: Transfer) -> None:
        closed._on_close = on_close
        raise KeyboardInterrupt

    closed._on_close = interrupted
    with pytest.raises(KeyboardInterrupt):
        closed.close()
    closed.close()
    assert list(bench.caller._transfers) == [other.read.number]
    assert reads_of(bench.send()) == [(other.read, 1)]


def test_nothing_is_taken_of_what_an_interrupted_close_has_given_back(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    transfer = bench.open(2)
    bench.receive(bench.send())
    tell = transfer._tell

    def interrupted(message: object) -> None:
        tell(message)
        raise KeyboardInterrupt

    transfer._tell = interrupted
    with pytest.raises(KeyboardInterrupt):
        transfer.close()
    transfer._tell = tell
    take = transfer.begin_take((0,))
    with pytest.raises(PoolClosed):
        transfer.result(take)
    transfer.close()


@pytest.mark.parametrize("grows", [False, True])
def test_scheduler_does_not_wait_for_downloads_of_others_where_views_alone_take_too_much(
    make_bench: Callable[[int], Bench], grows: bool
) -> None:
    bench = make_bench(4)
    holder = bench.open(1)
    held = holder.begin_take((0,))
    bench.receive(bench.send())
    _, view = holder.result(held)
    other = bench.open(10)
    in_flight = bench.send()
    assert reads_of(in_flight) == [(other.read, 0), (other.read, 1), (other.read, 2)]
    large = bench.open(1, parts=4, grows=grows)
    take = large.begin_take((0,))
    started = bench.send()
    if grows:
        assert reads_of(started) == [(large.read, 0)] * 4
        return
    assert started == []
    assert not take.is_done, "the view may end"
    bench.send(LEASE_TIMEOUT_S)
    with pytest.raises(ArenaExhausted):
        large.result(take)
    del view


def test_scheduler_waits_for_views_only_so_long_however_often_it_is_asked(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(3)
    bench.receive(bench.send())
    held = transfer.take(0)
    first = transfer.begin_take((1,))
    bench.send(now=10.0)  # from here on it is short of memory
    for later in range(1, 5):
        transfer.cancel(transfer.begin_take((2,)))  # others come and go meanwhile
        transfer.begin_take((1,))
        bench.send(now=10.0 + later)
        assert not first.is_done
    bench.send(now=10.0 + LEASE_TIMEOUT_S)
    with pytest.raises(ArenaExhausted, match="MPREADER_MAX_MEMORY"):
        transfer.result(first)
    assert len(held) == PART


def test_scheduler_memory_that_was_short_for_one_who_has_gone_fails_nobody_else(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    transfer = bench.open(2)
    bench.receive(bench.send())
    held = [transfer.take(0)]
    gone = transfer.begin_take((1,))
    bench.send(now=10.0)
    transfer.cancel(gone)
    bench.send(now=10.0 + LEASE_TIMEOUT_S)
    held.clear()
    take = transfer.begin_take((1,))
    bench.receive(bench.send(now=20.0))
    assert len(transfer.result(take)[1]) == PART


def test_scheduler_begins_to_wait_for_views_anew_once_memory_has_come(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(3)
    bench.receive(bench.send())
    held = [transfer.take(0)]
    take = transfer.begin_take((1,))
    bench.send(now=10.0)
    held.clear()
    bench.receive(bench.send(now=14.0))
    held.append(transfer.result(take)[1])
    take = transfer.begin_take((2,))
    bench.send(now=15.0)
    bench.send(now=19.9)
    assert not take.is_done
    held.clear()
    assert len(bench.send(now=19.9)) == 1


def test_scheduler_tries_a_part_again_that_was_cancelled_by_mistake(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    bench.scheduler.failed(Failed(part.number, FailureKind.CANCELLED, 100, "cancelled"), 0.0)
    assert not arrived(transfer)
    again = bench.scheduler.next_part(60.0)
    assert again is part
    assert again.received == 100


def cut(bench: Bench, part: PartState, received: int, seconds: float = 1.0) -> None:
    failure = Failed(
        part.number, FailureKind.SLOW, received, "slow", seconds=seconds, started_s=50.0, first_byte_s=50.5
    )
    bench.scheduler.failed(failure, now=51.0)


def test_scheduler_sends_the_rest_of_a_part_that_was_cut_before_all_others(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    transfer = bench.open(4)
    slow, *_ = bench.send()
    other = bench.open(4)
    cut(bench, slow, 1000)
    assert bench.send()[0] is slow
    assert (slow.received, slow.left_bytes, slow.cuts) == (1000, PART - 1000, 1)
    assert slow.cut is not None
    assert slow.cut.bytes_per_s == 2000.0
    bench.receive([slow])
    assert arrived(transfer) == [0]
    assert (bench.scheduler.stats(0).slow_cut, bench.scheduler.stats(0).retries) == (1, 0)
    assert arrived(other) == []


def test_scheduler_counts_no_cut_as_a_failure(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    for _ in range(10):  # max_attempts is 3
        cut(bench, part, 0)
        assert bench.send() == [part]
    for _ in range(2):
        bench.scheduler.failed(Failed(part.number, FailureKind.BROKEN, 0, "broken"), now=0.0)
        [again] = bench.send(now=100.0)
        cut(bench, again, 0)
        assert bench.send() == [part]
    # A cut that brought no byte forgives no failure, either.
    bench.scheduler.failed(Failed(part.number, FailureKind.BROKEN, 0, "broken"), now=0.0)
    with pytest.raises(TransportError, match="3 attempts"):
        transfer.take(0)


def test_scheduler_cut_that_came_after_the_last_byte_ends_the_part(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    cut(bench, part, PART)
    assert arrived(transfer) == [0]
    assert bench.send() == []
    assert bench.scheduler.stats(0).slow_cut == 0


def test_scheduler_part_that_is_cut_again_and_again_ends_at_its_deadline(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send(now=0.0)
    bench.scheduler.sent(part, 0.0)
    for now in range(10, 100, 10):
        cut(bench, part, 10)
        assert bench.send(now) == [part]
        bench.scheduler.sent(part, now)
        bench.scheduler.expire(now)
    bench.scheduler.expire(100.5)
    assert bench.scheduler.take_cancelled() == [part.number]
    with pytest.raises(PoolTimeout, match="within 100 s"):
        transfer.take(0)
    cut(bench, part, 0)  # the worker's answer to the Cancel
    assert bench.scheduler.find(part.number) is None
    assert bench.send() == []


def test_scheduler_part_whose_worker_died_before_it_was_cut_keeps_what_had_come(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    cut(bench, part, 1000)
    assert bench.send() == [part]
    bench.scheduler.lost([part.number], -9, "killed")
    assert bench.send() == [part]
    assert part.left_bytes == PART - 1000
    bench.receive([part])
    assert arrived(transfer) == [0]


def test_scheduler_slot_of_a_dropped_part_comes_back_only_when_its_worker_is_done(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    dropped = bench.open(1)
    [part] = bench.send()
    dropped.close()
    bench.read_inbox()
    assert bench.scheduler.take_cancelled() == [part.number]
    transfer = bench.open(1)
    transfer.begin_take((0,))
    assert bench.send() == [], "a worker may still write into that slot"
    bench.scheduler.failed(Failed(part.number, FailureKind.CANCELLED, 0, "cancelled"), 0.0)
    assert len(bench.send()) == 1


def test_scheduler_slot_of_a_dropped_part_that_waits_for_its_next_attempt_comes_back_at_once(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(1)
    dropped = bench.open(1)
    [part] = bench.send()
    bench.scheduler.failed(Failed(part.number, FailureKind.BUSY, 0, "HTTP 503", retry_after_s=60.0), 0.0)
    dropped.close()
    transfer = bench.open(1)
    assert reads_of(bench.send(now=1.0)) == [(transfer.read, 0)]
    assert bench.send(now=100.0) == [], "the part of the closed read was tried again"


def test_scheduler_demand_goes_before_what_was_started_already(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(6)
    ahead, urgent = bench.open(1, parts=4), bench.open(2)
    first = bench.scheduler.next_part(0.0)
    assert first is not None
    assert reads_of([first]) == [(ahead.read, 0)]
    urgent.begin_take((1,))
    bench.read_inbox()
    assert reads_of(bench.send())[:2] == [(urgent.read, 1), (ahead.read, 0)]


def test_scheduler_slot_that_arrives_after_the_close_comes_back(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    closed = bench.open(1)
    parts = bench.send()
    closed.close()  # the scheduler has not heard of it yet
    bench.receive(parts)
    transfer = bench.open(1)
    assert reads_of(bench.send()) == [(transfer.read, 0)]


def test_scheduler_discards_what_has_arrived_and_reads_it_when_it_is_demanded(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(3)
    transfer = bench.open(3)
    bench.receive(bench.send())
    transfer.discard(0, 2)
    assert bench.send() == [], "discarded slot reads were read again"
    assert arrived(transfer) == [2]
    transfer.begin_take((1,))
    assert reads_of(bench.send()) == [(transfer.read, 1)]


def test_memory_slot_with_several_holders_comes_back_with_the_last(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    slot = bench.arena.allocate(PART)
    assert slot is not None
    source = SourceName("s3://bucket/key", "bucket", "key", 3)
    leases = []
    for caller in (1, 2):
        message = OpenRead(ReadId(caller, 1), (source,), (SlotRead(0, PART, (Part(0, PART),)),))
        leases.append(bench.memory.lease(slot, ReadState(message, bench.caller.post).slot_reads[0]))
    bench.memory.take(leases[0])
    bench.memory.give_back(leases[0])
    bench.memory.give_back(leases[0])  # said twice, it counts once
    assert bench.arena.allocate(PART) is None
    bench.memory.give_back(leases[1])
    assert bench.arena.allocate(PART) is not None


def test_statuses_change_only_as_they_are_drawn(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    transfer = bench.open(1)
    [part] = bench.send()
    slot_read = part.slot_read
    bench.receive([part])
    assert (part.status, slot_read.status) == (PartStatus.ENDED, SlotStatus.READY)
    with pytest.raises(ValueError, match="ENDED can't become SENT"):
        part.move(PartStatus.SENT)
    with pytest.raises(ValueError, match="READY can't become FILLING"):
        slot_read.move(SlotStatus.FILLING)
    view = transfer.take(0)
    bench.read_inbox()
    assert (len(view), slot_read.status) == (PART, SlotStatus.TAKEN)


def test_scheduler_that_is_cleared_holds_on_to_nothing(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    transfer = bench.open(5)
    bench.send()
    bench.scheduler.clear()
    assert bench.scheduler.is_idle
    bench.caller.post(Ended(TransportError("broken")))
    with pytest.raises(TransportError, match="broken"):
        transfer.take(0)


def test_route_renewal_in_good_time_may_fail(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    slot_read = bench.first(bench.open(1))
    source = slot_read.source
    bench.source.error = TransportError("no credentials just now")
    routes.renew_if_old(slot_read, source.route_made + 10)
    routes.renew_if_old(slot_read, source.route_made + 241)
    bench.wait_for(SourceResolved)
    bench.read_inbox()
    assert source.error is None
    assert source.route is not None


def test_route_renewal_that_is_needed_may_not_fail(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    slot_read = bench.first(bench.open(1))
    source = slot_read.source
    bench.source.error = TransportError("no credentials any more")
    routes.renew(slot_read)
    routes.renew(slot_read)
    bench.wait_for(SourceResolved)
    bench.read_inbox()
    assert source.error is bench.source.error
    assert not bench.inbox, "it was asked for twice"


def test_scheduler_counts_wrong_answers_apart_from_other_failures(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    bench.source.max_attempts = 10
    transfer = bench.open(1)
    [part] = bench.send()
    kinds = [FailureKind.BUSY, FailureKind.BROKEN, *[FailureKind.MALFORMED] * 3]
    for now, kind in enumerate(kinds):
        assert part.status is PartStatus.SENT, f"given up before attempt {now + 1}"
        bench.scheduler.failed(Failed(part.number, kind, 0, "failed"), now * 100.0)
        bench.scheduler.next_part(now * 100.0 + 99)
    with pytest.raises(TransportError, match="5 attempts"):
        transfer.take(0)


# -- versions


ONE, TWO = (("last-modified", "one"),), (("last-modified", "two"),)


def test_scheduler_pins_what_the_first_response_says_of_the_version(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    transfer = bench.open(4)
    first, second, third, fourth = bench.send()
    bench.scheduler.fetched(first.number, ONE)
    bench.scheduler.fetched(second.number, ONE)
    assert first.slot_read.source.version == ObjectVersion(100 * PART, '"etag"', ONE)
    # In flight with the first one, and so not told of what that has found.
    bench.scheduler.fetched(third.number, TWO)
    bench.scheduler.failed(Failed(fourth.number, FailureKind.BROKEN, 100, "broke", found=TWO), 0.0)
    assert [isinstance(transfer._arrived[index], MpreaderError) for index in range(4)] == [False, False, True, True]
    for index in (2, 3):
        with pytest.raises(ObjectChanged, match="Last-Modified two, not one") as caught:
            transfer.take(index)
        assert caught.value.range == (index * PART, (index + 1) * PART)
    assert first.slot_read.source.version == ObjectVersion(100 * PART, '"etag"', ONE)
    assert not bench.scheduler._parts


def test_scheduler_takes_nothing_of_what_nobody_wants_for_the_version(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(2)
    transfer = bench.open(2)
    first, second = bench.send()
    transfer.discard(0, 1)
    bench.read_inbox()
    bench.scheduler.fetched(first.number, ONE)
    bench.scheduler.fetched(second.number, TWO)
    assert second.slot_read.source.version == ObjectVersion(100 * PART, '"etag"', TWO)


def test_scheduler_tells_a_pinned_source_what_was_found(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(4)
    bench.source = pinned = PinnedSource(bench.source, bench.source.open())  # type: ignore[assignment]
    reads = [bench.open(2), bench.open(2)]
    found = dict(zip(reads_of(parts := bench.send()), parts, strict=True))
    bench.scheduler.fetched(found[reads[0].read, 0].number, ONE)
    assert pinned.version == ObjectVersion(100 * PART, '"etag"', ONE)
    # The other read was opened before, and has found another version: its bytes can't be mixed with the first one's.
    bench.scheduler.fetched(found[reads[1].read, 0].number, TWO)
    for index in (0, 1):
        with pytest.raises(ObjectChanged, match=r"two, not one|one, not two"):
            reads[1].take(index)
    reads[0].take(0)
    assert pinned.version == ObjectVersion(100 * PART, '"etag"', ONE)


class Reroutable(Local):
    """A source with routes of two kinds. See :class:`mpreader.pool.source.Reroutable`."""

    def __init__(self, answer: Route | MpreaderError | None) -> None:
        super().__init__()
        self.refusals: list[Refusal] = []
        self._answer = answer

    def other_route(self, refusal: Refusal) -> Route | None:
        self.refusals.append(refusal)
        if isinstance(self._answer, MpreaderError):
            raise self._answer
        return self._answer


def refuse(bench: Bench, part: PartState, kind: FailureKind = FailureKind.DENIED) -> None:
    bench.scheduler.sent(part, 0.0)
    bench.scheduler.failed(Failed(part.number, kind, 0, "HTTP 403"), 1.0)


OTHER = Route(False, "host", 80, "/key", (("Authorization", "signature"),))


def test_parts_that_are_refused_together_are_sent_by_one_other_route(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(3)
    bench.source = source = Reroutable(OTHER)
    slot_read = bench.first(bench.open(3))
    parts = bench.send()
    bench.scheduler.sent(parts[2], 0.0)  # by the first route, as the others
    for part in parts[:2]:
        refuse(bench, part)
    bench.wait_for(SourceResolved)
    assert {part.number for part in bench.send(5.0)} == {part.number for part in parts[:2]}
    assert slot_read.source.route == OTHER
    bench.scheduler.failed(Failed(parts[2].number, FailureKind.DENIED, 0, "HTTP 403"), 6.0)  # of the route before
    assert bench.send(9.0) == [parts[2]]
    assert source.refusals == [Refusal(FailureKind.DENIED, "HTTP 403")]


@pytest.mark.parametrize("source", [Local(), Reroutable(None)], ids=["of-one-kind", "without-another"])
def test_refusal_stands_without_another_request_where_there_is_no_other_route(
    make_bench: Callable[[int], Bench], source: Local
) -> None:
    bench = make_bench(1)
    bench.source = source
    transfer = bench.open(1)
    take = transfer.begin_take((0,))
    [part] = bench.send()
    refuse(bench, part)
    bench.wait_for(SourceResolved)
    assert bench.send(5.0) == []
    with pytest.raises(AccessDenied, match=r"HTTP 403 \(1 attempt\)") as caught:
        transfer.result(take)
    assert caught.value.range == (0, PART)


def test_other_route_that_is_refused_as_well_is_the_last(make_bench: Callable[[int], Bench]) -> None:
    bench = make_bench(1)
    bench.source = source = Reroutable(OTHER)
    transfer = bench.open(1)
    take = transfer.begin_take((0,))
    for _ in range(2):
        [part] = bench.send(5.0)
        refuse(bench, part)
        if not take.is_done:
            bench.wait_for(SourceResolved)
    with pytest.raises(AccessDenied):
        transfer.result(take)
    assert len(source.refusals) == 1


def test_reason_why_there_is_no_other_route_reaches_parts_that_are_refused_later(
    make_bench: Callable[[int], Bench],
) -> None:
    bench = make_bench(2)
    bench.source = Reroutable(AccessDenied("the store's own reason", bucket="bucket", key="key"))
    transfer = bench.open(2)
    takes = [transfer.begin_take((index,)) for index in range(2)]
    first, second = bench.send()
    refuse(bench, first)
    bench.wait_for(SourceResolved)
    bench.read_inbox()
    refuse(bench, second)
    assert bench.send(5.0) == []
    for index, take in enumerate(takes):
        with pytest.raises(AccessDenied, match="the store's own reason") as caught:
            transfer.result(take)
        assert caught.value.range == (index * PART, (index + 1) * PART)
