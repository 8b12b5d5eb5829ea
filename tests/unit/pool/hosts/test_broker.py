"""The broker between the real scheduler and the real transfers, by messages only, in any order that can happen."""

from __future__ import annotations

import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpreader.config import KiB
from mpreader.errors import ArenaExhausted, MpreaderError, ObjectMissing, PoolClosed
from mpreader.pool.caller import Caller
from mpreader.pool.coordinator.arena import Arena
from mpreader.pool.coordinator.memory import SlotMemory
from mpreader.pool.coordinator.scheduler import Scheduler, SchedulerLimits
from mpreader.pool.coordinator.state import PartState
from mpreader.pool.hosts.broker import Broker
from mpreader.pool.hosts.messages import Subscription
from mpreader.pool.requests import (
    CloseRead,
    Demand,
    Discard,
    Ended,
    GiveBack,
    OpenRead,
    ReadId,
    Recall,
    ResolveSource,
    SegmentMemory,
    SlotArrived,
    SlotRead,
    SlotTaken,
    SourceName,
    SourceResolved,
    VersionLearned,
)
from mpreader.pool.source import ObjectVersion
from mpreader.pool.transfer import PendingTake
from mpreader.pool.worker.messages import Failed, FailureKind, MapSegment
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part

pytestmark = pytest.mark.timeout(60)

PART = 64 * KiB
READ = ReadId(1, 1)
ROUTE = Route(False, "host", 80, "/key")
SOURCE = SourceName("s3://bucket/key", "bucket", "key", 3)

Queue = deque[tuple[object, SegmentMemory | None]]


class Source:
    """The rank's own source, which learns of the version. See :class:`mpreader.pool.source.LearningSource`."""

    uri, bucket, key, max_attempts, version = *SOURCE[:4], None

    def __init__(self) -> None:
        self.learned: list[ObjectVersion] = []

    def open(self) -> ObjectVersion:
        raise AssertionError("the leader finds out the version")

    def route(self) -> Route:
        raise AssertionError("the leader finds out the route")

    def learn(self, version: ObjectVersion) -> None:
        self.learned.append(version)


class Rank:
    """A rank: takes its slots in order, one at a time, and checks the bytes for as long as it has them.

    Attributes:
        told: What it was told, and has not heard yet.
        said: What it has said, and the broker has not heard yet.
        taken: Indices of the slots that it has got, in this order, among those of the shared read.
        failures: Errors of those that it has not got.
    """

    def __init__(self, number: int, indices: Sequence[int], sources: int = 1) -> None:
        self.number = number
        self.indices = indices
        self.told: Queue = deque()
        self.said: deque[object] = deque()
        self.caller = Caller(number, self.said.append)
        self.sources = [Source() for _ in range(sources)]
        slot_reads = [slot_read_of(index) for index in indices]
        self.transfer, _ = self.caller.open(self.sources, slot_reads)
        self.wanted = list(range(len(indices)))  # its own indices of what it has not taken
        self.taken: list[int] = []
        self.failures: list[MpreaderError] = []
        self.view: memoryview | None = None
        self.skipped = 0
        self.was_closed = False
        self._take: PendingTake | None = None

    @property
    def subscription(self) -> Subscription:
        return Subscription(None, tuple(self.indices), (0,))

    @property
    def is_done(self) -> bool:
        return not self.wanted and self.view is None

    @property
    def waits(self) -> bool:
        return self._take is not None and not self._take.is_done

    def go_on(self) -> bool:
        """Drop the view that it has, or take the one that has come, or ask for the next one; False if it must wait."""
        if self.view is not None:
            self.check()
            self.view = None
            self.said += self.caller.collect()
        elif self._take is not None:
            if not self._take.is_done:
                return False
            self._end_take(self._take)
        elif self.wanted:
            self._take = self.transfer.begin_take((self.wanted[0],))
        else:
            return False
        return True

    def check(self) -> None:
        """Check that nothing was received into the slot that it has."""
        if self.view is not None:
            assert self.view.tobytes() == content(self.taken[-1])

    def skip(self, count: int) -> None:
        """Discard the next ones, but for the one that it waits for."""
        skipped = self.wanted[self._take is not None :][:count]
        if skipped:
            self.skipped += len(skipped)
            self.transfer.discard(skipped[0], skipped[-1] + 1)
            self.wanted = [index for index in self.wanted if index not in skipped]

    def close(self) -> None:
        if self._take is not None:
            self.transfer.cancel(self._take)
        self.transfer.close()
        self._take = None
        self.wanted = []
        self.was_closed = True

    def _end_take(self, take: PendingTake) -> None:
        self._take = None
        try:
            index, self.view = self.transfer.result(take)
        except MpreaderError as error:
            self.failures.append(error)
            if not isinstance(error, ArenaExhausted):
                self.wanted.pop(0)
            return
        assert index == self.wanted.pop(0)
        self.taken.append(self.indices[index])
        self.check()


class SharedHost:
    """A scheduler, a broker and ranks. What is said is heard, and parts are received, when the test says so.

    Attributes:
        received: How many times each slot read was received.
        recalled: How many times the scheduler has wanted each of them back.
        repeated: Those that were received once more after a rank has taken them.
    """

    def __init__(self, slots: int, count: int, ranks: Sequence[Sequence[int]]) -> None:
        self.arena = Arena(slots * PART, PART, PART)
        self.memory = SlotMemory(self.arena)
        self.to_broker: Queue = deque()
        self.to_scheduler: deque[object] = deque()
        limits = SchedulerLimits(slots * PART, 100.0, lease_timeout_s=1e9)
        self.scheduler = Scheduler(self.memory, lambda _: self._post, limits)
        self.repeated: list[int] = []
        self.broker = Broker(READ, self.to_scheduler.append, self.repeated.append)
        self.in_flight: list[PartState] = []
        self.received: Counter[int] = Counter()
        self.recalled: Counter[int] = Counter()
        self._leased: Counter[int] = Counter()
        self.ranks = {number: Rank(number, indices) for number, indices in enumerate(ranks)}
        self._handlers: dict[type, Callable[..., object]] = {
            CloseRead: self.scheduler.close,
            Demand: self.scheduler.demand,
            Discard: self.scheduler.discard,
            GiveBack: self._give_back,
            OpenRead: self.scheduler.open,
            SlotTaken: self.scheduler.slot_taken,
            SourceResolved: self.scheduler.source_resolved,
        }
        self._version = ObjectVersion(count * PART, '"etag"')
        opened = self.broker.open([SOURCE], [slot_read_of(index) for index in range(count)])
        for number, rank in self.ranks.items():
            self.broker.add_rank(number, rank.transfer.read, self._post_to(rank), rank.subscription)
        self.to_scheduler.append(opened)
        self.broker.discard_unwanted()

    # -- steps: each returns False if there is nothing to do

    def hear_rank(self, number: int) -> bool:
        said = self.ranks[number].said
        if said:
            self.broker.from_rank(number, said.popleft())
            return True
        return False

    def tell_rank(self, number: int) -> bool:
        rank = self.ranks[number]
        if rank.told:
            rank.caller.post(*rank.told.popleft())
            return True
        return False

    def hear_scheduler(self) -> bool:
        if self.to_broker:
            self.broker.from_coordinator(*self.to_broker.popleft())
            return True
        return False

    def tell_scheduler(self) -> bool:
        if not self.to_scheduler:
            return False
        message = self.to_scheduler.popleft()
        self._handlers[type(message)](message)
        self._send()
        return True

    def receive(self, at: int = 0) -> bool:
        """Receive one of the parts that are in flight."""
        if not self.in_flight:
            return False
        part = self.in_flight.pop(at % len(self.in_flight))
        slot = part.slot_read.slot
        assert slot is not None, "a slot is kept until nobody writes to it any more"
        slot.segment.map[slot.offset : slot.offset + PART] = content(part.slot_read.index)
        self.received[part.slot_read.index] += 1
        self.scheduler.fetched(part.number)
        self._send()
        return True

    def drop(self, number: int) -> None:
        """Let a rank die."""
        rank = self.ranks.pop(number)
        self.broker.drop(number)
        rank.view = None
        rank.close()

    def settle(self) -> None:
        """Let everybody hear everything, while no rank asks for more."""
        is_busy = True
        while is_busy:
            steps = [self.hear_scheduler(), self.tell_scheduler(), self.receive()]
            for number in [*self.ranks]:
                steps += self.tell_rank(number), self.hear_rank(number)
            is_busy = any(steps)

    def finish(self) -> None:
        """Let all ranks take what they want; fails if none of them gets on."""
        while not self.is_done:
            for rank in self.ranks.values():
                rank.go_on()
            self.settle()
            assert not all(rank.waits or rank.is_done for rank in self.ranks.values()) or self.is_done, "all ranks wait"

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.view = None
            rank.close()
            rank.caller.post(Ended(PoolClosed("the test is over")))
        self.scheduler.clear()
        self.arena.close()

    @property
    def is_done(self) -> bool:
        return all(rank.is_done for rank in self.ranks.values())

    @property
    def leased(self) -> Counter[int]:
        """Leases that the broker has."""
        return +self._leased

    def _post(self, message: object) -> None:
        if isinstance(message, ResolveSource):
            self.scheduler.source_resolved(SourceResolved(READ, 0, self._version, ROUTE, None))
            return
        if isinstance(message, Recall):
            self.recalled[message.slot_read] += 1
        if isinstance(message, SlotArrived):
            self._leased[message.lease] += 1
        self.to_broker.append((message, None))

    def _post_to(self, rank: Rank) -> Callable[[object, SegmentMemory | None], None]:
        return lambda message, memory: rank.told.append((message, memory))

    def _give_back(self, message: GiveBack) -> None:
        self._leased[message.lease] -= 1
        assert self._leased[message.lease] == 0, "given back twice, or never had"
        self.scheduler.give_back(message)

    def _send(self) -> None:
        while (part := self.scheduler.next_part(0.0)) is not None:
            self.in_flight.append(part)
        made, _ = self.arena.take_changes()
        for segment in made:
            self.to_broker.append((MapSegment(segment.number, segment.size), segment))


def slot_read_of(index: int) -> SlotRead:
    return SlotRead(0, PART, (Part(index * PART, (index + 1) * PART),))


def content(index: int) -> bytes:
    return bytes([index % 251]) * PART


@contextlib.contextmanager
def shared_host(slots: int, count: int, ranks: Sequence[Sequence[int]]) -> Iterator[SharedHost]:
    """Let ranks share a read of ``count`` slot reads, in memory for so many slots."""
    host = SharedHost(slots, count, ranks)
    try:
        yield host
    finally:
        host.close()


def check_received_once(host: SharedHost) -> None:
    """Check that nothing was received twice without need, and that nothing is kept."""
    for index, times in host.received.items():
        assert times <= 1 + host.recalled[index]
    assert not host.leased
    assert not host.memory.has_taken
    assert not host.memory.ahead_bytes


subscriptions = st.integers(1, 12).flatmap(
    lambda count: st.lists(st.sets(st.integers(0, count - 1)).map(sorted), min_size=1, max_size=5)
)


@given(st.integers(1, 5), subscriptions)
@example(1, [[2], [0, 1, 2]])  # the first rank is ahead: what it takes is kept for the second one
def test_ranks_that_take_in_order_get_all_in_any_memory(slots: int, ranks: list[list[int]]) -> None:
    with shared_host(slots, 12, ranks) as host:
        host.finish()
        for rank, indices in zip(host.ranks.values(), ranks, strict=True):
            assert rank.taken == indices
            assert not rank.failures
        check_received_once(host)


class Schedule:
    """A random schedule: who says, hears, takes, discards, closes or dies next."""

    def __init__(self, host: SharedHost, seed: int) -> None:
        self._host = host
        self._random = random.Random(seed)

    def run(self, steps: int) -> None:
        host = self._host
        for _ in range(steps):
            if not host.ranks:
                break
            self._step(self._random.choice([*host.ranks]))
            for rank in host.ranks.values():
                rank.check()

    def _step(self, number: int) -> None:
        host = self._host
        rank = host.ranks[number]
        steps: list[Callable[[], object]] = [
            *3 * [host.hear_scheduler, host.tell_scheduler, rank.go_on],
            *4 * [lambda: host.tell_rank(number), lambda: host.hear_rank(number)],
            *3 * [lambda: host.receive(self._random.randrange(100))],
        ]
        if not self._random.randrange(60):
            self._end(number)
        elif not self._random.randrange(40):
            rank.skip(self._random.randrange(3))
        else:
            self._random.choice(steps)()

    def _end(self, number: int) -> None:
        if self._random.random() < 0.5:
            self._host.ranks[number].close()
        else:
            self._host.drop(number)


@settings(max_examples=300)
@given(st.integers(1, 6), subscriptions, st.integers(0, 1 << 32))
def test_random_schedules_end_with_the_right_bytes_and_nothing_kept(
    slots: int, ranks: list[list[int]], seed: int
) -> None:
    with shared_host(slots, 12, ranks) as host:
        Schedule(host, seed).run(300)
        host.finish()
        host.settle()
        for number, rank in host.ranks.items():
            assert not rank.failures
            assert rank.taken == sorted(set(rank.taken))
            assert set(rank.taken) <= set(ranks[number])
            if not rank.was_closed:
                assert len(rank.taken) + rank.skipped == len(ranks[number])
        check_received_once(host)


def test_rank_that_has_a_view_gets_the_slot_a_second_time() -> None:
    with shared_host(2, 1, [[0], [0]]) as host:
        for rank in host.ranks.values():
            rank.go_on()
        host.settle()
        first, second = host.ranks.values()
        first.go_on()
        assert first.view is not None
        take = first.transfer.begin_take((0,))
        host.settle()
        _, view = first.transfer.result(take)
        assert view == content(0)
        assert host.received == {0: 1}
        second.go_on()
        second.go_on()
        first.go_on()  # the first view ends
        host.settle()
        assert host.leased, "the second one has not ended"
        del view
        host.ranks[0].said += first.caller.collect()
        host.settle()
        check_received_once(host)


def test_slot_that_comes_by_another_download_than_a_rank_has_taken_is_told_of() -> None:
    with shared_host(1, 7, [[6], [0, 1, 6]]) as host:
        ahead, behind = host.ranks.values()
        ahead.go_on()
        host.settle()
        ahead.go_on()
        ahead.go_on()  # it is done
        host.finish()
        assert behind.taken == [0, 1, 6]
        assert host.received[6] == 2
        assert host.repeated == [6]


def test_slot_that_no_rank_has_taken_yet_may_be_received_again() -> None:
    with shared_host(1, 7, [[6], [0, 1, 6]]) as host:
        ahead, behind = host.ranks.values()
        ahead.skip(1)
        host.finish()
        assert behind.taken == [0, 1, 6]
        assert not host.repeated


def test_slot_that_fails_fails_for_all_and_the_rest_goes_on() -> None:
    with shared_host(4, 3, [[0, 1, 2], [1], [0, 2]]) as host:
        for rank in host.ranks.values():
            rank.go_on()
        host.tell_scheduler()
        part = next(part for part in host.in_flight if part.slot_read.index == 1)
        host.in_flight.remove(part)
        host.scheduler.failed(Failed(part.number, FailureKind.MISSING, 0, "404"), 0.0)
        host.finish()
        assert [rank.taken for rank in host.ranks.values()] == [[0, 2], [], [0, 2]]
        assert [[type(error) for error in rank.failures] for rank in host.ranks.values()] == [
            [ObjectMissing],
            [ObjectMissing],
            [],
        ]
        check_received_once(host)


def test_version_is_told_to_the_ranks_that_read_the_object_before_any_bytes() -> None:
    with shared_host(4, 2, [[0, 1], [1]]) as host:
        version = ObjectVersion(2 * PART, '"etag"', (("last-modified", "yesterday"),))
        host.to_broker.append((VersionLearned(READ, 0, version), None))
        for rank in host.ranks.values():
            rank.go_on()
        host.finish()
        for rank in host.ranks.values():
            assert [source.learned for source in rank.sources] == [[version]]


def test_end_of_the_coordinator_is_the_end_for_all_ranks() -> None:
    with shared_host(4, 3, [[0, 1], [1, 2]]) as host:
        for rank in host.ranks.values():
            rank.go_on()
        host.to_broker.append((Ended(PoolClosed("closed")), None))
        while host.hear_scheduler() or any(host.tell_rank(number) for number in host.ranks):
            pass
        assert host.broker.has_ended
        assert host.broker.is_over
        for number, rank in host.ranks.items():
            assert not rank.waits
            rank.go_on()
            assert [type(error) for error in rank.failures] == [PoolClosed]
            assert not host.hear_rank(number) or host.broker.is_over


def test_rank_that_keeps_memory_is_overdue_only_while_others_wait_for_it() -> None:
    with shared_host(1, 2, [[0, 1], [0, 1]]) as host:
        quick, slow = host.ranks.values()
        for rank in (quick, slow):
            rank.go_on()
        host.settle()
        assert host.broker.overdue(0.0) == set()
        for rank in (quick, slow):
            rank.go_on()  # takes
        quick.go_on()  # drops
        quick.go_on()  # waits for the second one, for which there is no room
        host.settle()
        assert quick.waits
        assert host.broker.overdue(0.0) == {slow.number}
        assert host.broker.overdue(1e9) == set()
        host.drop(slow.number)
        host.finish()
        assert quick.taken == [0, 1]


def test_rank_that_waits_itself_is_not_overdue_though_it_keeps_memory() -> None:
    broker = Broker(ReadId(1, 1), lambda _: None, lambda _: None)
    broker.open([], [SlotRead(0, 1, (Part(0, 1),)) for _ in range(3)])
    behind, ahead = 1, 2
    answers: list[object] = []
    broker.add_rank(behind, ReadId(behind, 1), lambda *_: None, Subscription(None, (0, 1, 2), (0,)))
    broker.add_rank(
        ahead, ReadId(ahead, 1), lambda message, _: answers.append(message), Subscription(None, (1, 2), (0,))
    )
    broker.from_rank(behind, Demand(ReadId(behind, 1), 0))
    broker.from_rank(ahead, Demand(ReadId(ahead, 1), 0))
    broker.from_coordinator(SlotArrived(ReadId(1, 1), 1, 1, 0, 0))  # goes to both
    [arrived] = answers
    assert isinstance(arrived, SlotArrived)
    broker.from_rank(ahead, GiveBack(arrived.lease))
    broker.from_rank(ahead, Demand(ReadId(ahead, 1), 1))
    assert broker.overdue(-1.0) == set()
    broker.from_coordinator(SlotArrived(ReadId(1, 1), 0, 2, 0, 0))
    assert broker.overdue(-1.0) == {behind}
