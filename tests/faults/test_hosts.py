"""Ranks that share a host's read: one of them dies, hangs, raises or never comes; the others load well or say why."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest

from mpreader import PoolConfig, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.dcp.host_plan import Need
from mpreader.pool.hosts.identity import TOKEN_BYTES
from mpreader.pool.hosts.messages import Join
from mpreader.testing import Fault, FaultKind, FaultServer
from scripts.faults.ranks import (
    COLUMNS,
    DATA_PATHS,
    ROWS,
    Box,
    Job,
    Mishap,
    Nursery,
    Outcome,
    Place,
    Rank,
    Work,
    make_files,
    make_tensors,
)
from tests.refusal import statement_refusing

# The bound is 10 s from the fault on; a machine that is busy may take longer.
WITHIN_S: Final = 40.0
NAMES: Final = sorted(make_tensors())
# The checkpoint is 39 parts of four tensors each; 16 of them fit into memory at one time.
POOL: Final = PoolConfig(workers=2, connections_per_worker=2, max_memory=4 * MiB, part_size=256 * KiB)
MIDDLE: Final = 68  # number of a tensor in the 19th part
LATE: Final = 130
# A silent rank is dropped after 0.6 of lease_timeout_s, a silent leader left after _SILENCE_S.
HASTY: Final = dataclasses.replace(POOL, lease_timeout_s=0.8)
HASTY_LIMITS: Final = {"_SILENCE_S": 0.8, "_JOIN_S": 1.2, "_GATHER_S": 0.6, "_HEARTBEAT_S": 0.1, "_VERDICT_S": 0.6}

row = pytest.mark.row
RANK_DIES: Final = "ranks of a host: one is killed"
RANK_HANGS: Final = "ranks of a host: one is stopped, never comes, or is slow"
RANK_FAILS: Final = "ranks of a host: an exception or a Ctrl-C in one"
RANKS_ERR: Final = "ranks of a host: S3 refuses, an object is overwritten, a record is damaged"
INTRUDERS: Final = "ranks of a host: a process that is none of them"
NO_MEMORY: Final = "ranks of a host: out of shared memory, descriptors or workers"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(make_files()) as server:
        yield server


Group = Callable[..., Job]
Mishaps = Mapping[int, Mishap]
NO_MISHAPS: Final[Mishaps] = MappingProxyType({})


@pytest.fixture
def new_ranks(nursery: Nursery) -> Iterator[Callable[[int], list[Rank]]]:
    """Make ranks, which end with the test."""
    ranks: list[Rank] = []

    def make(count: int) -> list[Rank]:
        ranks.extend(nursery.rank() for _ in range(count))
        return ranks[-count:]

    yield make
    for rank in ranks:
        rank.kill()


@pytest.fixture
def group(new_ranks: Callable[[int], list[Rank]], server: FaultServer) -> Group:
    """Make ranks that have planned a load; each loads whole tensors, or rows or columns of all."""

    def begin(count: int, kind: str = "whole", mishaps: Mishaps = NO_MISHAPS, **more: Any) -> Job:
        return Job(new_ranks(count), works_of(server, count, kind, mishaps, **more))

    return begin


def works_of(
    server: FaultServer,
    count: int,
    kind: str,
    mishaps: Mishaps = NO_MISHAPS,
    pool: PoolConfig = POOL,
    before_by_place: Mapping[int, str] = MappingProxyType({}),
    **more: Any,
) -> list[Work]:
    client = S3ClientConfig("us-east-1", endpoint_url=server.endpoint_url, force_path_style=True, max_attempts=3)
    return [
        Work(
            boxes_of(kind, place, count),
            client,
            pool,
            mishaps=(mishaps[place],) if place in mishaps else (),
            before=before_by_place.get(place, ""),
            **more,
        )
        for place in range(count)
    ]


def boxes_of(kind: str, place: int, count: int) -> tuple[Box, ...]:
    rows, columns = ROWS // count, COLUMNS // count
    offsets, sizes = {
        "whole": ((0, 0), (ROWS, COLUMNS)),
        "rows": ((place * rows, 0), (rows, COLUMNS)),
        "columns": ((0, place * columns), (ROWS, columns)),
    }[kind]
    return tuple(Box(name, offsets, sizes) for name in NAMES)


def results(job: Job, *places: int) -> list[str]:
    """Wait for ranks; returns how each has ended, which is told in full if it is no plain result."""
    outcomes = [job.ranks[place].outcome(WITHIN_S) for place in places or range(len(job.ranks))]
    return ["dead" if outcome is None else said(outcome) for outcome in outcomes]


def damages() -> list[Fault]:
    """Flip a bit in every fourth tensor of a file on its first way: in what place 2 loads, where it is rows.

    The leader, which has place 0, is to verify the first of these, and other ranks the next ones.
    """
    nbytes = len(make_files()[DATA_PATHS[0]])
    count = len(NAMES) // len(DATA_PATHS)
    covered = [nbytes * number // count + 45_000 for number in range(0, count, 4)]
    return [Fault(FaultKind.FLIPPED_BIT, path=DATA_PATHS[0], covering=byte, at=(1,)) for byte in covered]


def said(outcome: Outcome) -> str:
    return outcome.result if outcome.result != "wrong" else f"wrong: {outcome.text}"


def other_than(place: int, count: int) -> list[int]:
    return [other for other in range(count) if other != place]


KINDS: Final = pytest.mark.parametrize("kind", ["whole", "rows", "columns"])
PLACES: Final = pytest.mark.parametrize("place", [0, 1], ids=["leader", "member"])


# -- killed


@PLACES
@row(RANK_DIES, within_s=15)
def test_rank_killed_before_it_joins_costs_the_others_nothing_but_time(group: Group, place: int) -> None:
    job = group(3, limits=HASTY_LIMITS)
    job.ranks[place].kill()
    job.load(*other_than(place, 3))
    assert results(job) == ["exact" if other != place else "dead" for other in range(3)]
    assert job.left() == []


@PLACES
@row(RANK_DIES, within_s=15)
def test_rank_killed_while_the_needs_are_gathered(group: Group, place: int) -> None:
    job = group(3, "rows", limits=HASTY_LIMITS)
    job.load(*([0, 1] if place == 0 else [1, 2]))  # the last one to come keeps the others waiting
    job.ranks[place].kill()
    job.load(2 if place == 0 else 0)
    assert results(job) == ["exact" if other != place else "dead" for other in range(3)]
    assert job.left() == []


@PLACES
@KINDS
@row(RANK_DIES, within_s=15)
def test_rank_killed_in_the_middle_of_its_slots(group: Group, place: int, kind: str) -> None:
    job = group(3, kind, {place: Mishap("resolve_tensor", MIDDLE, "kill")})
    job.load()
    assert results(job) == ["exact" if other != place else "dead" for other in range(3)]
    assert job.left() == []


@PLACES
@row(RANK_DIES, within_s=15)
def test_rank_killed_after_its_own_part(group: Group, place: int) -> None:
    slow = 2
    job = group(3, mishaps={slow: Mishap("resolve_tensor", LATE, "wait")})
    job.load()
    job.ranks[slow].wait_for_mishap()
    assert results(job, 0, 1) == ["exact", "exact"]
    job.ranks[place].kill()
    job.ranks[slow].go_on()
    assert results(job, slow) == ["exact"]
    assert job.left() == []


# -- stopped, late, slow


@PLACES
@pytest.mark.parametrize(("kind", "call"), [("whole", "resolve_tensor"), ("rows", "commit_tensor")])
@row(RANK_HANGS, within_s=15)
def test_rank_that_is_stopped_is_dropped_and_reads_by_itself_when_it_goes_on(
    group: Group, place: int, kind: str, call: Any
) -> None:
    # Nothing is verified: what is read of memory that others have now must be noticed without a checksum.
    stop, wait = Mishap(call, 3, "stop"), Mishap("resolve_tensor", MIDDLE, "wait")
    job = group(4, kind, {place: stop, 3: wait}, pool=HASTY, limits=HASTY_LIMITS, verify=False)
    job.load()
    # When the one is dropped, the others get on, until the second one keeps all memory: so all of it was used again.
    job.ranks[3].wait_for_mishap()
    others = other_than(place, 3)
    assert results(job, *others) == ["exact"] * 2
    job.ranks[3].go_on()
    job.ranks[place].signal(signal.SIGCONT)
    assert results(job, place, 3) == ["exact", "exact"]
    assert job.left() == []


@row(RANK_HANGS, within_s=15)
def test_rank_that_is_stopped_with_the_usual_limits_holds_the_others_up_for_less_than_10_s(group: Group) -> None:
    # Two jobs at one time, since both are waited for.
    jobs = [group(3, "whole", {place: Mishap("resolve_tensor", 3, "stop")}) for place in (0, 1)]
    for job in jobs:
        job.load()
    for place, job in enumerate(jobs):
        others = other_than(place, 3)
        outcomes = [job.ranks[other].outcome(WITHIN_S) for other in others]
        assert [outcome and said(outcome) for outcome in outcomes] == ["exact", "exact"]
        # Where a member is stopped, the others share on.
        received = [outcome is not None and outcome.received_bytes > 0 for outcome in outcomes]
        assert received == [place == 0 or other == 0 for other in others]
    for place, job in enumerate(jobs):
        job.ranks[place].signal(signal.SIGCONT)
        assert results(job, place) == ["exact"]
        assert job.left() == []


@PLACES
@row(RANK_HANGS, within_s=15)
def test_rank_that_never_comes_is_not_waited_for(group: Group, place: int) -> None:
    job = group(3, limits=HASTY_LIMITS)
    others = other_than(place, 3)
    job.load(*others)
    assert results(job, *others) == ["exact", "exact"]
    job.load(place)  # now
    assert results(job, place) == ["exact"]
    assert job.left() == []


@PLACES
@row(RANK_HANGS, within_s=15)
def test_slow_rank_is_waited_for_while_it_says_something(group: Group, server: FaultServer, place: int) -> None:
    job = group(3, mishaps={place: Mishap("resolve_tensor", 3, "wait")})
    job.load()
    job.ranks[place].wait_for_mishap()
    server.wait_for_requests(10)
    job.ranks[place].go_on()
    outcomes = [rank.outcome(WITHIN_S) for rank in job.ranks]
    assert [outcome and said(outcome) for outcome in outcomes] == ["exact"] * 3
    # Each byte came once.
    assert [outcome is not None and outcome.received_bytes > 0 for outcome in outcomes] == [True, False, False]
    assert job.left() == []


@PLACES
@row(RANK_HANGS, within_s=15)
def test_rank_that_is_stuck_in_its_planner_is_dropped(group: Group, place: int) -> None:
    """Its process lives, and its other threads do."""
    stuck, wait = Mishap("resolve_tensor", 3, "wait"), Mishap("resolve_tensor", MIDDLE, "wait")
    job = group(4, "columns", {place: stuck, 3: wait}, pool=HASTY, limits=HASTY_LIMITS, verify=False)
    job.load()
    job.ranks[place].wait_for_mishap()
    job.ranks[3].wait_for_mishap()
    assert results(job, *other_than(place, 3)) == ["exact", "exact"]
    for rank in (place, 3):
        job.ranks[rank].go_on()
    assert results(job, place, 3) == ["exact", "exact"]
    assert job.left() == []


# -- exceptions


@PLACES
@pytest.mark.parametrize("call", ["read", "resolve_tensor", "commit_tensor"])
@pytest.mark.parametrize(("kind", "error"), [("raise", "RankError"), ("interrupt", "KeyboardInterrupt")])
@row(RANK_FAILS, within_s=15)
def test_rank_that_raises_does_not_keep_memory_from_the_others(
    group: Group, place: int, call: Any, kind: Any, error: str
) -> None:
    # Its reader stays open, and its error is kept with all frames, as in DCP, until all ranks have ended.
    job = group(3, mishaps={place: Mishap(call, 1 if call == "read" else MIDDLE, kind)}, limits=HASTY_LIMITS)
    job.load()
    assert results(job) == ["exact" if other != place else error for other in range(3)]
    assert job.left() == []


@row(RANK_FAILS, within_s=15)
def test_leader_whose_pool_is_closed_leaves_the_others_to_themselves(group: Group) -> None:
    job = group(3, mishaps={0: Mishap("resolve_tensor", MIDDLE, "end pools")})
    job.load()
    assert results(job, 1, 2) == ["exact", "exact"]
    assert results(job, 0)[0] in {"exact", "PoolClosed"}
    assert job.left() == []


FAIL: Final = """
import {module} as module

def fail(*_, **__):
    raise ArithmeticError("an error that nobody expects")

module.{name} = fail
"""


@pytest.mark.parametrize(
    ("module", "name"),
    [("mpreader.dcp.load", "needed_boxes"), ("mpreader.dcp.sharing", "load_progress")],
    ids=["before the others are served", "while the others are served"],
)
@row(RANK_FAILS, within_s=15)
def test_leader_that_fails_before_it_has_begun_to_read_is_not_waited_for(group: Group, module: str, name: str) -> None:
    # Its error is kept with all frames. The others would wait for it for ever.
    patient = {"_JOIN_S": 600.0, "_SILENCE_S": 600.0}
    job = group(3, before_by_place={0: FAIL.format(module=module, name=name)}, limits=patient)
    job.load()
    assert results(job) == ["ArithmeticError", "exact", "exact"]
    assert job.left(all_of_it=False) == []  # before the end of its pool, which would end all that there is
    assert job.left() == []


# -- intruders

CONNECT: Final = """
import os, socket

def connect():
    os.setuid({user})
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect({address!r})
        try:
            connection.sendall({token!r} + {join!r})
            return len(connection.recv(1))
        except ConnectionError:
            return 0

pid = os.fork()
if pid == 0:
    status = 2
    try:
        status = connect()
    finally:
        os._exit(status)
assert os.waitpid(pid, 0)[1] == 0, "it was answered"
"""


@pytest.mark.parametrize("intruder", ["without the token", "of another user"])
@row(INTRUDERS, within_s=15)
def test_process_that_is_none_of_the_ranks_is_told_nothing(
    group: Group, new_ranks: Callable[[int], list[Rank]], server: FaultServer, intruder: str
) -> None:
    if os.getuid() != 0 and intruder == "of another user":
        pytest.skip("needs to be root, to become another user")
    job = group(2, limits={"_GATHER_S": 20.0})
    job.load(0)
    leader, is_other_user = job.shares[0].leader, intruder == "of another user"
    message = pickle.dumps(Join(Need({}, verifies=False)))
    program = CONNECT.format(
        user=65534 if is_other_user else os.getuid(),
        address=leader.address,
        token=leader.token if is_other_user else bytes(TOKEN_BYTES),
        join=struct.pack("<IB", len(message), 0) + message,
    )
    [stranger] = new_ranks(1)
    stranger.offer(Work((), S3ClientConfig("us-east-1", endpoint_url=server.endpoint_url), POOL, before=program))
    stranger.offered(WITHIN_S)
    job.load(1)
    assert not stranger.is_dead
    assert results(job) == ["exact", "exact"]
    assert job.left() == []


# -- memory, descriptors


@pytest.mark.parametrize(
    ("place", "call", "result"),
    [
        (0, "memfd_create", "exact"),
        (1, "memfd_create", "exact"),
        (0, "pipe2", "PoolError"),
        (1, "pipe2", "PoolError"),
        (0, "sendmsg", "PoolError"),
        (1, "sendmsg", "exact"),  # a member sends no descriptors
    ],
)
@row(NO_MEMORY, within_s=15)
def test_rank_that_is_refused_a_system_call_leaves_the_others_well(
    group: Group, place: int, call: str, result: str
) -> None:
    job = group(3, "rows", before_by_place={place: statement_refusing([call], errno.EPERM)}, limits=HASTY_LIMITS)
    job.load()
    assert results(job) == ["exact" if other != place else result for other in range(3)]
    assert job.left() == []


NO_MORE_THREADS: Final = """
import threading

start = threading.Thread.start

def start_unless_it_is_one_too_many(thread):
    if thread.name.startswith("mpreader-host"):
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = start_unless_it_is_one_too_many
"""


@PLACES
@row(NO_MEMORY, within_s=15)
def test_rank_that_can_start_no_thread_for_the_sharing_reads_by_itself(group: Group, place: int) -> None:
    job = group(3, before_by_place={place: NO_MORE_THREADS})
    job.load()
    outcomes = [rank.outcome(WITHIN_S) for rank in job.ranks]
    assert [outcome and said(outcome) for outcome in outcomes] == ["exact"] * 3
    # Without a leader each rank receives for itself; else the leader, and the one that can't follow.
    received = [outcome is not None and outcome.received_bytes > 0 for outcome in outcomes]
    assert received == [True, True, place == 0]
    assert job.left() == []


@KINDS
@row(NO_MEMORY, within_s=15)
def test_memory_of_few_slots_is_enough(group: Group, kind: str) -> None:
    job = group(3, kind, {1: Mishap("commit_tensor", MIDDLE, "wait")}, pool=dataclasses.replace(POOL, max_memory=MiB))
    job.load()
    job.ranks[1].wait_for_mishap()
    job.ranks[1].go_on()
    outcomes = [rank.outcome(WITHIN_S) for rank in job.ranks]
    assert [outcome and (said(outcome), outcome.loaded_again) for outcome in outcomes] == [("exact", 0)] * 3
    assert job.left() == []


# -- what S3 says


@KINDS
@row(RANKS_ERR, within_s=15)
def test_refusal_is_the_same_error_in_all_ranks(group: Group, server: FaultServer, kind: str) -> None:
    job = group(3, kind)
    server.inject(*(Fault(FaultKind.STATUS, path=path, status=403) for path in DATA_PATHS[1:2]))
    job.load()
    assert results(job) == ["AccessDenied"] * 3
    assert job.left() == []


@KINDS
@row(RANKS_ERR, within_s=15)
def test_object_that_is_overwritten_is_the_same_error_in_all_ranks(
    group: Group, server: FaultServer, kind: str
) -> None:
    job = group(3, kind)
    newer = make_files(1)
    server.stage(DATA_PATHS[1], newer[DATA_PATHS[1]])
    server.inject(Fault(FaultKind.OVERWRITTEN, path=DATA_PATHS[1], at=(3,)))
    job.load()
    assert results(job) == ["ObjectChanged"] * 3
    assert job.left() == []


@pytest.mark.parametrize("kind", ["whole", "rows"])
@row(RANKS_ERR, within_s=15)
def test_what_a_rank_receives_again_is_of_the_version_that_its_host_has_read(
    group: Group, server: FaultServer, kind: str
) -> None:
    # Of rows, each rank first receives again what it has verified itself, and found damaged, all of the first file;
    # then what others have found damaged, of both.
    last = Mishap("resolve_tensor", len(NAMES), "wait")
    job = group(3, kind, dict.fromkeys(range(3), last))
    server.inject(*damages(), Fault(FaultKind.FLIPPED_BIT, path=DATA_PATHS[1], covering=300_000, at=(1,)))
    job.load()
    for rank in job.ranks:
        rank.wait_for_mishap()
    server.put(DATA_PATHS[1], make_files(1)[DATA_PATHS[1]])
    for rank in job.ranks:
        rank.go_on()
    assert results(job) == ["ObjectChanged"] * 3
    assert job.left() == []


@row(RANKS_ERR, within_s=15)
def test_record_that_stays_damaged_is_the_same_error_in_all_ranks(group: Group, server: FaultServer) -> None:
    job = group(3)
    server.inject(Fault(FaultKind.FLIPPED_BIT, path=DATA_PATHS[1], covering=300_000))
    job.load()
    assert results(job) == ["ChecksumMismatch"] * 3
    assert job.left() == []


@KINDS
@row(RANKS_ERR, within_s=15)
def test_records_that_are_damaged_on_the_way_are_received_again(group: Group, server: FaultServer, kind: str) -> None:
    job = group(3, kind)
    server.inject(*damages())
    job.load()
    assert results(job) == ["exact"] * 3
    assert job.left() == []


@PLACES
@KINDS
@pytest.mark.parametrize(("mishap", "result"), [("kill", "dead"), ("raise", "RankError"), ("stop", "exact")])
@row(RANKS_ERR, within_s=15)
def test_what_a_rank_was_to_verify_is_verified_by_the_others_if_it_does_not(
    group: Group, server: FaultServer, place: int, kind: str, mishap: Any, result: str
) -> None:
    job = group(3, kind, {place: Mishap("resolve_tensor", 1, mishap)}, pool=HASTY, limits=HASTY_LIMITS)
    server.inject(*damages())
    job.load()
    others = other_than(place, 3)
    assert results(job, *others) == ["exact", "exact"]
    job.ranks[place].signal(signal.SIGCONT)
    assert results(job, place) == [result]
    assert job.left() == []


# Each part counts as one that was received a second time, after a rank has taken it: memory was short.
REPEATED: Final = """
from mpreader.pool.hosts.broker import Broker
slot_arrived = Broker._slot_arrived

def arrived_again(broker, message):
    broker._slots[message.slot_read].was_taken = True
    slot_arrived(broker, message)

Broker._slot_arrived = arrived_again
"""


@row(RANKS_ERR, within_s=15)
def test_what_has_come_by_several_downloads_is_verified_by_each_rank(group: Group) -> None:
    job = group(2, "rows", before_by_place={0: REPEATED})
    job.load()
    outcomes = [rank.outcome(WITHIN_S) for rank in job.ranks]
    half = len(NAMES) // 2  # which the other rank has verified
    assert [outcome and (said(outcome), outcome.loaded_again) for outcome in outcomes] == [("exact", half)] * 2
    assert job.left() == []


# -- by torch's own load


@pytest.mark.parametrize(
    ("kind", "fault", "mishaps", "said_of"),
    [
        ("rows", None, {}, ""),
        ("whole", Fault(FaultKind.FLIPPED_BIT, path=DATA_PATHS[1], covering=300_000), {}, "is damaged in"),
        ("rows", Fault(FaultKind.FLIPPED_BIT, path=DATA_PATHS[1], covering=300_000), {}, "is damaged in"),
        ("rows", None, {0: Mishap("resolve_tensor", MIDDLE, "raise")}, "RankError"),
        ("columns", None, {1: Mishap("commit_tensor", MIDDLE, "raise")}, "RankError"),
    ],
    ids=["well", "damaged", "damaged for all", "leader raises", "member raises"],
)
@row(RANKS_ERR, within_s=15)
def test_error_of_one_rank_is_the_error_of_the_job(
    new_ranks: Callable[[int], list[Rank]],
    server: FaultServer,
    tmp_path: Path,
    kind: str,
    fault: Fault | None,
    mishaps: Mishaps,
    said_of: str,
) -> None:
    ranks = new_ranks(3)
    if fault is not None:
        server.inject(fault)
    for number, (rank, work) in enumerate(zip(ranks, works_of(server, 3, kind, mishaps), strict=True)):
        rank.join(Place(work, number, 3, f"file://{tmp_path}/job"))
    outcomes = [rank.outcome(WITHIN_S) for rank in ranks]
    assert [outcome and said(outcome) for outcome in outcomes] == ["CheckpointException" if said_of else "exact"] * 3
    assert all(outcome is not None and said_of in outcome.text for outcome in outcomes)
    assert [rank.close(all_of_it=True) for rank in ranks] == [[], [], []]


@PLACES
@row(RANK_DIES, within_s=15)
def test_rank_killed_in_torchs_own_load_ends_the_others_in_an_error_of_the_process_group(
    new_ranks: Callable[[int], list[Rank]], server: FaultServer, tmp_path: Path, place: int
) -> None:
    ranks = new_ranks(3)
    works = works_of(server, 3, "rows", {place: Mishap("resolve_tensor", MIDDLE, "kill")}, limits=HASTY_LIMITS)
    for number, (rank, work) in enumerate(zip(ranks, works, strict=True)):
        rank.join(Place(work, number, 3, f"file://{tmp_path}/job"))
    for other, rank in enumerate(ranks):
        outcome = rank.outcome(WITHIN_S)
        assert (outcome is None) == (other == place)
        assert outcome is None or (outcome.result, "gloo" in outcome.text) == ("RuntimeError", True), outcome
    assert [rank.close(all_of_it=True) for rank in ranks] == [None if other == place else [] for other in range(3)]
