"""Storm of ranks: a host's ranks load together by random plans, under random faults, while anything happens to them.

Each schedule, which is one load of two to six ranks, must end in time, for each rank, in exactly the right bytes or in
one error of mpreader's; in the right bytes, if no more was wrong than that other ranks died, hung or failed, and that
answers were slow. Whatever happens, the end of the sharing must never reach a rank's user. Run as the other storm::

    scripts/soak --ranks --seconds 3600
"""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mpreader import PoolConfig, S3ClientConfig, errors
from mpreader.config import KiB, MiB
from mpreader.testing.fault import Fault, FaultKind, random_faults
from mpreader.testing.fault_server import FaultServer
from scripts.faults.plans import StormFailure
from scripts.faults.ranks import (
    COLUMNS,
    DATA_PATHS,
    ROWS,
    Box,
    Job,
    Mishap,
    Nursery,
    Rank,
    Work,
    make_files,
    make_tensors,
)

__all__ = ["RankOutcome", "run_rank_storm", "summary"]

DEADLINE_S: Final = 40.0
SCHEDULES_PER_SERVER: Final = 8
MOST_RANKS: Final = 6
_NAMES: Final = sorted(make_tensors())
# Waiting times far below the usual ones, so that schedules are short.
_LIMITS: Final = {"_SILENCE_S": 0.6, "_JOIN_S": 0.6, "_GATHER_S": 0.3, "_HEARTBEAT_S": 0.1, "_VERDICT_S": 0.6}
_SLOW_KINDS: Final = (FaultKind.DELAY, FaultKind.STALL, FaultKind.SLOW)
# What a mishap may make of the load of the rank itself.
_ENDS: Final = {
    "kill": {"dead"},
    "stop": set(),
    "interrupt": {"KeyboardInterrupt"},
    "raise": {"RankError"},
    "end pools": {"PoolClosed"},
}
_TYPED: Final = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MpreaderError)
}


@dataclass(frozen=True, slots=True)
class RankOutcome:
    """End of one schedule.

    Attributes:
        kind: What the ranks loaded: ``"rows"``, say.
        results: How each rank's load has ended.
        mishaps: What happened to ranks: ``"kill"``, say.
        faults: Responses that were made wrong.
        shared_bytes: Bytes that ranks got from their leaders.
        seconds: Duration of the slowest rank's load.
    """

    kind: str
    results: tuple[str, ...]
    mishaps: tuple[str, ...]
    faults: int
    shared_bytes: int
    seconds: float


def run_rank_storm(seed: int, schedules: int, most_ranks: int = MOST_RANKS) -> list[RankOutcome]:
    """Run schedules one after the other, most in ranks that have loaded before; the same for the same arguments.

    Args:
        seed: Seed of the random choices.
        schedules: Number of schedules.
        most_ranks: Most ranks of a schedule, at least 2.

    Raises:
        StormFailure: A rank's load ended in wrong bytes, in another error than mpreader's, or not at all.
    """
    outcomes: list[RankOutcome] = []
    with Nursery() as nursery:
        while len(outcomes) < schedules:
            number = len(outcomes)
            rng = random.Random(f"ranks {seed} {number}")
            with _Setup(nursery, rng) as setup:
                names = [f"ranks, seed {seed}, schedule {index}" for index in range(number, schedules)]
                outcomes += [_run_named(setup, rng, name, most_ranks) for name in names[:SCHEDULES_PER_SERVER]]
    return outcomes


class _Setup(contextlib.ExitStack):
    """A server, settings of the ranks, and ranks, which are used for several schedules.

    Attributes:
        server: The server that injects the faults.
        client_config: How the ranks reach it.
        pool_config: Settings of their pools.
    """

    def __init__(self, nursery: Nursery, rng: random.Random) -> None:
        super().__init__()
        self._nursery = nursery
        self._ranks: list[Rank] = []
        self.server = self.enter_context(FaultServer(make_files()))
        self.client_config = S3ClientConfig(
            "us-east-1", endpoint_url=self.server.endpoint_url, force_path_style=True, max_attempts=8
        )
        self.pool_config = PoolConfig(
            workers=rng.choice((1, 2)),
            connections_per_worker=rng.choice((1, 2, 4)),
            max_memory=rng.choice((1, 2, 8)) * MiB,
            part_size=rng.choice((64, 128, 256)) * KiB,
            connect_timeout_s=2.0,
            stall_timeout_s=0.6,
            timeout_s=8.0,
            worker_timeout_s=2.0,
            lease_timeout_s=rng.choice((0.7, 1.4)),
        )
        self.callback(self._end_ranks)

    def ranks(self, count: int) -> list[Rank]:
        """Returns ranks that live; those that have died are replaced."""
        self._ranks = [rank for rank in self._ranks if not rank.is_dead]
        self._ranks += [self._nursery.rank() for _ in range(count - len(self._ranks))]
        return self._ranks[:count]

    def _end_ranks(self) -> None:
        for rank in self._ranks:
            rank.kill()


def _run_named(setup: _Setup, rng: random.Random, name: str, most_ranks: int) -> RankOutcome:
    try:
        return _run_schedule(setup, rng, most_ranks)
    except (StormFailure, TimeoutError) as failure:
        raise StormFailure(f"{name}: {failure}") from failure


def _run_schedule(setup: _Setup, rng: random.Random, most_ranks: int) -> RankOutcome:
    count = rng.randrange(2, most_ranks + 1)
    kind = rng.choice(("rows", "columns", "whole", "subsets", "mixed"))
    mishaps = _choose_mishaps(rng, count)
    late = set(rng.sample(range(count), rng.choice((0, 0, 0, 1)))) - set(mishaps)
    faults = _choose_faults(rng)
    is_passing = all(fault.kind in _SLOW_KINDS for fault in faults)
    works = [
        Work(
            _boxes(rng, kind, place, count),
            setup.client_config,
            setup.pool_config,
            verify=rng.choice((True, True, False, "whole")),
            mishaps=(mishaps[place],) if place in mishaps else (),
            limits=_LIMITS,
        )
        for place in range(count)
    ]
    for path, content in make_files().items():
        setup.server.put(path, content)
    setup.server.stage(DATA_PATHS[1], make_files(1)[DATA_PATHS[1]])
    job = Job(setup.ranks(count), works)
    before = len(setup.server.requests)
    setup.server.inject(*faults)
    outcome = _load(job, mishaps, late, is_passing=is_passing)
    setup.server.inject()
    left = job.left(all_of_it=rng.random() < 0.3)
    if left:
        raise StormFailure(f"left behind after {outcome.results}: {', '.join(left)}")
    struck = sum(request.fault is not None for request in setup.server.requests[before:])
    return RankOutcome(kind, outcome.results, outcome.mishaps, struck, outcome.shared_bytes, outcome.seconds)


def _load(job: Job, mishaps: dict[int, Mishap], late: set[int], *, is_passing: bool) -> RankOutcome:
    """Let the ranks read, and judge how each has ended."""
    last = [place for place in range(len(job.ranks)) if place in late or _kind_of(mishaps, place) == "stop"]
    first = [place for place in range(len(job.ranks)) if place not in last]
    job.load(*(place for place in range(len(job.ranks)) if place not in late))
    results: dict[int, str] = {}
    shared_bytes, seconds = 0, 0.0
    for place in [*first, *last]:
        if place in late:
            job.load(place)
        elif place in last:  # all others have ended without it
            job.ranks[place].resume(DEADLINE_S)
        outcome = job.ranks[place].outcome(DEADLINE_S)
        if outcome is None:
            results[place] = "dead"
            continue
        results[place] = outcome.result
        shared_bytes += outcome.shared_bytes
        if place in first:
            seconds = max(seconds, outcome.seconds)
        allowed = {"exact"} | _ENDS.get(_kind_of(mishaps, place), set()) | (set() if is_passing else _TYPED)
        if outcome.result not in allowed:
            raise StormFailure(
                f"rank {place} of {len(job.ranks)} ended in {outcome.result}: {outcome.text}; mishaps {mishaps}, "
                f"late {late}, before it {results}"
            )
    dead = {place for place, result in results.items() if result == "dead"}
    if not dead <= {place for place in mishaps if mishaps[place].kind == "kill"}:
        raise StormFailure(f"ranks {dead} died of themselves; mishaps {mishaps}")
    ordered = tuple(results[place] for place in range(len(job.ranks)))
    kinds = tuple(mishap.kind for mishap in mishaps.values()) + ("late",) * len(late)
    return RankOutcome("", ordered, kinds, 0, shared_bytes, seconds)


def _kind_of(mishaps: dict[int, Mishap], place: int) -> str:
    return mishaps[place].kind if place in mishaps else ""


def _choose_mishaps(rng: random.Random, count: int) -> dict[int, Mishap]:
    mishaps: dict[int, Mishap] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        call = rng.choice(("read", "resolve_tensor", "resolve_tensor", "commit_tensor"))
        number = 1 if call == "read" else rng.randrange(1, 120)
        kind = rng.choice(("kill", "kill", "stop", "stop", "interrupt", "raise", "end pools"))
        # The leader is struck as often as all others together.
        mishaps[rng.choice((0, rng.randrange(count)))] = Mishap(call, number, kind)  # type: ignore[arg-type]
    return mishaps


def _choose_faults(rng: random.Random) -> list[Fault]:
    """Choose faults of the files of tensors; ``.metadata`` has been read before."""
    kind = rng.choice(("none", "none", "slow", "slow", "passing", "refused", "overwritten"))
    if kind == "passing":
        return list(random_faults(rng.randrange(1 << 30), gets=40, rate=0.1))
    if kind == "refused":
        first = rng.randrange(1, 10)
        return [Fault(FaultKind.STATUS, at=range(first, first + 100), path=rng.choice(DATA_PATHS), status=403)]
    if kind == "overwritten":
        return [Fault(FaultKind.OVERWRITTEN, at=(rng.randrange(1, 10),), path=DATA_PATHS[1])]
    return [
        Fault(rng.choice(_SLOW_KINDS), at=(number,), after_bytes=rng.choice((0, 1, 100_000)), seconds=0.5)
        for number in range(1, 41)
        if kind == "slow" and rng.random() < 0.1
    ]


def _boxes(rng: random.Random, kind: str, place: int, count: int) -> tuple[Box, ...]:
    if kind == "mixed":
        kind = rng.choice(("rows", "columns", "whole", "subsets", "nothing"))
    if kind == "nothing":
        return ()
    names = rng.sample(_NAMES, rng.randrange(len(_NAMES) + 1)) if kind == "subsets" else _NAMES
    if kind == "rows":
        start, end = place * ROWS // count, (place + 1) * ROWS // count
        return tuple(Box(name, (start, 0), (end - start, COLUMNS)) for name in names)
    if kind == "columns":
        start, end = place * COLUMNS // count, (place + 1) * COLUMNS // count
        return tuple(Box(name, (0, start), (ROWS, end - start)) for name in names)
    return tuple(Box(name, (0, 0), (ROWS, COLUMNS)) for name in names)


def summary(outcomes: Sequence[RankOutcome]) -> str:
    """Counts of all outcomes, in some lines."""
    results = collections.Counter(result for outcome in outcomes for result in outcome.results)
    mishaps = collections.Counter(mishap for outcome in outcomes for mishap in outcome.mishaps)
    return "\n".join(
        [
            f"{len(outcomes)} loads of {sum(results.values())} ranks, {sum(outcome.faults for outcome in outcomes)} "
            f"faults injected, {sum(outcome.shared_bytes for outcome in outcomes) / MiB:.0f} MiB shared, "
            f"slowest {max((outcome.seconds for outcome in outcomes), default=0):.1f} s",
            "ranks: " + ", ".join(f"{name} {count}" for name, count in results.most_common()),
            "mishaps: " + ", ".join(f"{name} {count}" for name, count in mishaps.most_common()),
        ]
    )
