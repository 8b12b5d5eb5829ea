"""Transfers: the right bytes in bounded memory, whatever the consumers do."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader.config import KiB, MiB, PoolConfig
from mpreader.errors import ArenaExhausted, PlanError, PoolClosed, PoolError, TransportError
from mpreader.pool.pool import Pool, release_shared_pool, shared_pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import ObjectVersion
from mpreader.pool.transfer import Transfer
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.integration.conftest import CutObject, MakePool

pytestmark = pytest.mark.timeout(60)

PART = 64 * KiB
# Four parts of 64 KiB are all that may be held at one time.
TINY = {"max_memory": 4 * PART, "part_size": PART}


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        threading.Event().wait(0.005)


def check(slot_read: SlotRead, view: memoryview, data: bytes) -> None:
    for part in slot_read.parts:
        size = part.end - part.start
        assert view[part.slot_offset : part.slot_offset + size] == data[part.start : part.end]


def take_all(transfer: Transfer, data: bytes) -> None:
    for index, slot_read in enumerate(transfer.slot_reads):
        view = transfer.take(index)
        assert len(view) == slot_read.nbytes
        check(slot_read, view, data)


def run_all(*calls: Callable[[], object]) -> None:
    """Run calls in threads of their own; raises what one of them raises."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a consumer hangs"
    if errors:
        raise errors[0]


# -- bytes


def test_transfer_brings_slot_reads_of_every_shape(make_pool: MakePool, source: Any, data: bytes) -> None:
    pool = make_pool(workers=2, part_size=256 * KiB)
    chance = random.Random(1)
    tiny = [SlotRead(0, 100, (Part(s, s + 100),)) for s in chance.sample(range(len(data) - 100), 200)]
    full = [SlotRead(0, 256 * KiB, (Part(s, s + 256 * KiB),)) for s in range(0, 4 * MiB, 256 * KiB)]
    one_byte = [SlotRead(0, 1, (Part(len(data) - 1, len(data)),))]
    large = SlotRead(
        0, 5 * MiB, tuple(Part(s, s + 256 * KiB, slot_offset=s - MiB) for s in range(MiB, 6 * MiB, 256 * KiB))
    )
    scattered = SlotRead(
        0, 200_000, (Part(7, 1007), Part(500_000, 600_001, slot_offset=1024), Part(50, 51, slot_offset=199_999))
    )
    transfer = pool.read([source], [*tiny, *full, *one_byte, large, scattered])
    take_all(transfer, data)
    transfer.close()
    assert source.opened == 1, "one HEAD pins the version for all"


def test_transfer_can_be_taken_in_any_order(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    transfer = make_pool(**TINY).read([source], cut_object(PART, 40))
    order = list(range(40))
    random.Random(2).shuffle(order)
    for index in order:
        check(transfer.slot_reads[index], transfer.take(index), data)
    transfer.close()


def test_transfer_reads_a_slot_read_again_when_it_is_taken_again(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer, data: bytes
) -> None:
    transfer = make_pool().read([source], cut_object(PART, 1))
    first = transfer.take(0)
    first[:] = bytes(PART)
    assert transfer.take(0) == data[:PART]
    assert len(server.requests) == 2
    transfer.close()


def test_discarding_a_slot_read_that_another_thread_waits_for_does_no_harm(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer, data: bytes
) -> None:
    server.inject(Fault(FaultKind.DELAY, at=(1,), seconds=0.5))
    transfer = make_pool().read([source], cut_object(PART, 1))
    taken: list[memoryview] = []
    waiting = threading.Thread(target=lambda: taken.append(transfer.take(0)))
    waiting.start()
    wait_until(lambda: transfer._pending)
    transfer.discard(0, 1)
    waiting.join(30)
    transfer.close()
    assert taken == [data[:PART]]


def test_transfer_gives_each_thread_its_own_reading_of_one_slot_read(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer, data: bytes
) -> None:
    server.inject(Fault(FaultKind.DELAY, at=(1,), seconds=0.2))
    transfer = make_pool().read([source], cut_object(PART, 1))
    run_all(*[lambda: check(transfer.slot_reads[0], transfer.take(0), data)] * 4)
    transfer.close()


# -- back-pressure


def test_transfer_reads_ahead_no_further_than_the_window(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer
) -> None:
    pool = make_pool(workers=2, connections_per_worker=2, part_size=PART)
    ahead = pool.sizes.window_bytes // PART
    assert ahead == 5
    transfer = pool.read([source], cut_object(PART))
    for taken in range(5):
        wait_until(lambda: len(transfer._arrived) == ahead)
        # Whoever waits is served beyond the window: by then the coordinator has had every chance to read on.
        other = pool.read([source], cut_object(PART, 1))
        other.take(0)
        other.close()
        gets = [request for request in server.requests if request.range != f"bytes=0-{PART - 1}"]
        assert len(gets) == ahead - 1 + taken
        transfer.take(taken)
    transfer.close()


def test_transfers_of_one_thread_share_a_tiny_arena(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    pool = make_pool(**TINY)
    transfers = [pool.read([source], cut_object(PART, 16, start=number * 1000)) for number in range(3)]
    for index in range(16):
        for transfer in transfers:
            check(transfer.slot_reads[index], transfer.take(index), data)
    for transfer in transfers:
        transfer.close()


def test_transfers_of_many_threads_in_random_order_all_end(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    pool = make_pool(workers=2, **TINY)

    def consume(seed: int) -> None:
        transfer = pool.read([source], cut_object(PART, 30, start=seed * 333))
        order = list(range(30))
        random.Random(seed).shuffle(order)
        for index in order:
            check(transfer.slot_reads[index], transfer.take(index), data)
        transfer.close()

    run_all(*(lambda seed=seed: consume(seed) for seed in range(6)))
    assert pool.coordinator is not None
    assert pool.coordinator.reserved_bytes <= 4 * PART


# -- leases


@pytest.mark.row("views held while the load goes on; close with live views")
def test_views_that_are_held_end_in_an_error_that_names_the_knob(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    transfer = make_pool(lease_timeout_s=0.3, **TINY).read([source], cut_object(PART, 8))
    held = [transfer.take(index) for index in range(4)]
    started = time.monotonic()
    with pytest.raises(ArenaExhausted, match="MPREADER_MAX_MEMORY") as caught:
        transfer.take(4)
    assert time.monotonic() - started >= 0.3
    assert f"{4 * PART} are held" in str(caught.value)
    held.clear()
    del caught
    check(transfer.slot_reads[4], transfer.take(4), data)
    transfer.close()


def test_views_that_end_in_another_thread_make_room(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    transfer = make_pool(lease_timeout_s=20, **TINY).read([source], cut_object(PART, 8))
    held = [transfer.take(index) for index in range(4)]
    dropper = threading.Timer(0.2, held.clear)
    dropper.start()
    check(transfer.slot_reads[4], transfer.take(4), data)
    dropper.join()
    transfer.close()


def test_slot_read_larger_than_the_limit_is_refused_at_once(make_pool: MakePool, source: Any) -> None:
    parts = tuple(Part(start, start + PART, slot_offset=start) for start in range(0, 8 * PART, PART))
    transfer = make_pool(lease_timeout_s=3600, **TINY).read([source], [SlotRead(0, 8 * PART, parts)])
    with pytest.raises(ArenaExhausted, match=r"in one piece.*MPREADER_MAX_MEMORY"):
        transfer.take(0)
    transfer.close()


def test_transfer_that_grows_goes_beyond_the_limit_and_comes_back(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    pool = make_pool(lease_timeout_s=30, **TINY)
    parts = tuple(Part(start, start + PART, slot_offset=start) for start in range(0, 8 * PART, PART))
    transfer = pool.read([source], [*cut_object(PART, 6), SlotRead(0, 8 * PART, parts)], grows=True)
    held = [transfer.take(index) for index in range(7)]
    for slot_read, view in zip(transfer.slot_reads, held, strict=True):
        check(slot_read, view, data)
    coordinator = pool.coordinator
    assert coordinator is not None
    assert coordinator.reserved_bytes >= 14 * PART
    del view
    held.clear()
    wait_until(lambda: coordinator.reserved_bytes <= 4 * PART)
    transfer.close()


def test_memory_of_a_large_view_is_really_gone_when_it_is_dropped(make_pool: MakePool, source: Any) -> None:
    def mapped() -> int:
        with open("/proc/self/maps") as maps:
            return sum("/memfd:mpreader" in line for line in maps)

    before = mapped()
    parts = tuple(Part(start, start + PART, slot_offset=start) for start in range(0, 8 * PART, PART))
    transfer = make_pool(part_size=PART).read([source], [SlotRead(0, 8 * PART, parts)])
    view = transfer.take(0)
    assert mapped() == before + 1
    del view
    wait_until(lambda: mapped() == before)
    transfer.close()


@pytest.mark.row("views held while the load goes on; close with live views")
def test_views_stay_valid_after_close_and_take_their_memory_along(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    pool = make_pool(part_size=PART)
    transfer = pool.read([source], cut_object(PART, 3))
    views = [transfer.take(index) for index in range(3)]
    transfer.close()
    pool.close()
    assert "/memfd:mpreader" in Path("/proc/self/maps").read_text()
    for slot_read, view in zip(transfer.slot_reads, views, strict=True):
        check(slot_read, view, data)
    del view
    views.clear()
    assert "/memfd:mpreader" not in Path("/proc/self/maps").read_text(), "the closed pool holds on to memory"


# -- ends


def test_close_ends_a_take_that_waits(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer
) -> None:
    server.inject(Fault(FaultKind.STALL, seconds=3600))
    pool = make_pool()
    by_transfer, by_pool = pool.read([source], cut_object(PART, 2)), pool.read([source], cut_object(PART, 2, start=MiB))

    def take(transfer: Transfer) -> None:
        with pytest.raises(PoolClosed):
            transfer.take(1)

    def close() -> None:
        wait_until(lambda: by_transfer._pending and by_pool._pending)
        by_transfer.close()
        pool.close()

    run_all(lambda: take(by_transfer), lambda: take(by_pool), close)
    with pytest.raises(PoolClosed, match="make a new one"):
        pool.read([source], cut_object(PART, 1))


def test_transfer_close_cancels_downloads_and_gives_their_memory_to_others(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer, data: bytes
) -> None:
    server.inject(Fault(FaultKind.STALL, at=range(1, 5), seconds=3600, after_bytes=1000))
    # Two workers have four parts in flight from the start, however busy the host is.
    pool = make_pool(workers=2, lease_timeout_s=3600, stall_timeout_s=3600, timeout_s=3600, **TINY)
    abandoned = pool.read([source], cut_object(PART, 4))
    server.wait_for_requests(4)
    abandoned.close()
    transfer = pool.read([source], cut_object(PART, 4))
    take_all(transfer, data)  # all memory was taken by downloads that would not have ended
    assert len(server.requests) == 8
    transfer.close()


def test_discarded_slot_reads_are_not_read_and_others_are(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer, data: bytes
) -> None:
    transfer = make_pool(**TINY).read([source], cut_object(PART, 30))
    transfer.take(0)
    transfer.discard(1, 28)
    for index in (28, 29):
        check(transfer.slot_reads[index], transfer.take(index), data)
    starts = {
        int((request.range or "").removeprefix("bytes=").partition("-")[0]) // PART for request in server.requests
    }
    assert len(starts) <= 12, "slot reads were read that had been discarded"
    check(transfer.slot_reads[5], transfer.take(5), data)
    transfer.close()


def test_transfer_that_is_taken_from_after_close_raises(
    make_pool: MakePool, cut_object: CutObject, source: Any
) -> None:
    transfer = make_pool().read([source], cut_object(PART, 1))
    transfer.close()
    transfer.close()
    with pytest.raises(PoolClosed):
        transfer.take(0)


def test_range_past_the_end_is_refused_without_a_request(
    make_pool: MakePool, source: Any, server: FaultServer, data: bytes
) -> None:
    end = len(data) + 1
    transfer = make_pool().read([source], [SlotRead(0, 10, (Part(end - 10, end),))])
    with pytest.raises(PlanError, match=f"{end}.*{len(data)} bytes"):
        transfer.take(0)
    assert not server.requests
    transfer.close()


def test_slot_read_whose_parts_do_not_fit_is_refused(make_pool: MakePool, source: Any) -> None:
    pool = make_pool()
    for parts in ((), (Part(0, 11),), (Part(0, 5, slot_offset=6),), (Part(3, 3),), (Part(0, 5, slot_offset=-1),)):
        with pytest.raises(PlanError):
            pool.read([source], [SlotRead(0, 10, parts)])


@pytest.mark.row("Ctrl-C")
def test_read_that_is_interrupted_as_it_begins_is_closed(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool()
    pool.start()
    assert pool.coordinator is not None
    try_tell = pool.coordinator.try_tell

    def interrupted(message: object) -> bool:
        try_tell(message)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool.coordinator, "try_tell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.read([source], cut_object(PART, 4))
    assert pool._caller is not None
    assert not pool._caller._transfers, "it would go on to the end, and hold its memory"
    transfer = pool.read([source], cut_object(PART, 4))
    take_all(transfer, data)
    transfer.close()


def test_source_that_can_not_be_opened_fails_only_its_own_reading(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    class Broken:
        bucket, key, uri, max_attempts = "b", "k", "s3://b/k", 1
        version = None

        def open(self) -> ObjectVersion:
            raise RuntimeError("something in a library")

        def route(self) -> Route:
            raise AssertionError("nobody may ask: it was not opened")

    pool = make_pool()
    bad, good = pool.read([Broken()], [SlotRead(0, 1, (Part(0, 1),))] * 3), pool.read([source], cut_object(PART, 3))
    for index in range(3):
        with pytest.raises(TransportError, match=r"b/k.*something in a library"):
            bad.take(index)
    take_all(good, data)
    bad.close()
    good.close()


def test_pool_that_is_idle_gives_everything_back_and_starts_again(
    make_pool: MakePool, cut_object: CutObject, source: Any, data: bytes
) -> None:
    pool = make_pool(idle_timeout_s=0.2)
    for run in range(1, 3):
        transfer = pool.read([source], cut_object(PART, 3))
        kept = transfer.take(0)
        take_all(transfer, data)
        assert pool.is_running
        transfer.close()
        wait_until(lambda: not pool.is_running)
        check(transfer.slot_reads[0], kept, data)
        assert pool.stats().bytes == run * 4 * PART, "the numbers of a run that has ended are kept"
    assert "not running" in repr(pool)


def test_pool_that_is_in_use_is_not_idle(
    make_pool: MakePool, cut_object: CutObject, source: Any, server: FaultServer
) -> None:
    server.inject(Fault(FaultKind.DELAY, seconds=0.6))
    pool = make_pool(idle_timeout_s=0.1)
    transfer = pool.read([source], cut_object(PART, 1))
    assert len(transfer.take(0)) == PART
    transfer.close()


@pytest.mark.row("exception in the consumer; reader dropped without close")
def test_pool_dropped_without_close_ends_its_workers(cut_object: CutObject, source: Any, data: bytes) -> None:
    from mpreader.config import PoolConfig

    pool = Pool(PoolConfig(workers=1, connections_per_worker=2, max_memory=MiB))
    transfer = pool.read([source], cut_object(PART, 3))
    check(transfer.slot_reads[0], transfer.take(0), data)
    del pool  # the fixture of all tests finds what is left of it
    with pytest.raises(PoolClosed):
        transfer.take(0)


def test_pool_in_a_reference_cycle_is_collected(cut_object: CutObject) -> None:
    from mpreader.config import PoolConfig

    pool = Pool(PoolConfig(workers=1, connections_per_worker=2, max_memory=MiB))
    pool.start()
    holder: list[object] = [pool]
    holder.append(holder)
    coordinator = pool.coordinator
    assert coordinator is not None
    del pool, holder
    gc.collect()
    assert coordinator.is_ended


# -- pools that are shared, end, or fail to start


def test_shared_pool_that_is_used_again_is_not_suspended(source: Any, cut_object: CutObject, data: bytes) -> None:
    pool = shared_pool(PoolConfig(workers=1, connections_per_worker=2, max_memory=MiB))
    transfer = pool.read([source], cut_object(PART, 2))
    transfer.take(0)
    pool.suspend_if_unused()  # as the user before would, who has just counted itself out
    check(transfer.slot_reads[1], transfer.take(1), data)
    transfer.close()
    release_shared_pool(pool)
    assert not pool.is_running


def test_pool_with_an_endless_idle_time_works(make_pool: MakePool, source: Any, cut_object: CutObject) -> None:
    pool = make_pool(idle_timeout_s=1e9)
    for _ in range(2):
        transfer = pool.read([source], cut_object(PART, 1))
        assert len(transfer.take(0)) == PART
        transfer.close()
    assert pool.is_running


def test_pool_that_ends_tells_everybody_whatever_other_threads_say_meanwhile(
    make_pool: MakePool, source: Any, cut_object: CutObject, server: FaultServer
) -> None:
    server.inject(Fault(FaultKind.STALL, seconds=3600))
    pool = make_pool()
    transfer = pool.read([source], cut_object(PART, 1))
    coordinator = pool.coordinator
    assert coordinator is not None
    is_over = threading.Event()

    def talk() -> None:
        while not is_over.is_set():
            transfer.discard(1, 1000)

    def take() -> None:
        with pytest.raises(PoolClosed):
            transfer.take(0)

    talkers = [threading.Thread(target=talk) for _ in range(2)]
    for talker in talkers:
        talker.start()
    taker = threading.Thread(target=take)
    taker.start()
    wait_until(lambda: transfer._pending)
    pool.close()
    taker.join(30)
    is_over.set()
    for talker in talkers:
        talker.join(30)
    assert not taker.is_alive()
    assert coordinator.workers.pids == []


def test_pool_that_fails_to_start_again_counts_nothing_twice(
    make_pool: MakePool, source: Any, cut_object: CutObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(idle_timeout_s=0.1)
    transfer = pool.read([source], cut_object(PART, 3))
    for index in range(3):
        transfer.take(index)
    transfer.close()
    wait_until(lambda: not pool.is_running)
    monkeypatch.setattr("multiprocessing.spawn.get_executable", lambda: "/there/is/no/interpreter")
    for _ in range(3):
        with pytest.raises(PoolError, match="worker processes can't start"):
            pool.start()
    assert pool.stats().bytes == 3 * PART
