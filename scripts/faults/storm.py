"""Storm: random reads under random faults, while workers are killed and objects overwritten, all derived from a seed.

Each schedule, which is one read and its faults, must end within its deadline in exactly the right bytes of one version,
or in one error of mpreader's; where nothing is wrong but that answers are slow, in the right bytes. Anything else
raises :class:`StormFailure` with the seed that repeats it. The tests run some schedules; for hours of them::

    scripts/soak --seconds 3600
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import random
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mpreader import MpreaderError, PoolConfig, RangeFetcher, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.testing.fault import TRANSIENT_KINDS, Fault, FaultKind, random_faults
from mpreader.testing.fault_server import FaultServer
from scripts.faults.disruption import Disruption
from scripts.faults.plans import Plan, Setup, StormFailure, choose_plan, make_checkpoint

__all__ = ["Outcome", "StormFailure", "run_storm", "summary"]

DEADLINE_S: Final = 30.0
SCHEDULES_PER_POOL: Final = 8
# Faults that may last: a read under one of these may end in an error of mpreader's.
_LASTING_KINDS: Final = (
    FaultKind.OTHER_ETAG,
    FaultKind.NO_ETAG,
    FaultKind.WEAK_ETAG,
    FaultKind.OTHER_MODIFIED,
    FaultKind.NO_VALIDATORS,
    FaultKind.NO_IF_MATCH,
    FaultKind.COMPRESSED,
    FaultKind.TRICKLE,
    FaultKind.WRONG_TOTAL,
    FaultKind.STATUS,
)
# Kinds by which an answer is right, but slow: for ever, where nobody cuts it.
_SLOW_KINDS: Final = (FaultKind.DELAY, FaultKind.STALL, FaultKind.TRICKLE, FaultKind.SLOW)
_PASSING_KINDS: Final = (*TRANSIENT_KINDS, FaultKind.TRICKLE, FaultKind.SLOW)
_FOR_EVER_S: Final = 3600.0
_LASTING_STATUSES: Final = (403, 404, 412, 416, 503)


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of one schedule.

    Attributes:
        plan: Name of the plan.
        result: ``"exact"``, or the name of the error's class.
        is_transient: True if each fault struck single requests only, and nothing was killed, stopped or overwritten.
        is_slow: True if nothing was wrong but that some answers were slow.
        faults: Responses that were made wrong.
        cuts: Requests of the fetcher that were cut, since they were much slower than others.
        kills: Workers that were killed or stopped.
        seconds: Wall time.
    """

    plan: str
    result: str
    is_transient: bool
    is_slow: bool
    faults: int
    cuts: int
    kills: int
    seconds: float


def run_storm(seed: int, schedules: int) -> list[Outcome]:
    """Run schedules one after the other, most on a warm pool, some on a new one; the same for the same arguments.

    Args:
        seed: Seed of the random choices.
        schedules: Number of schedules.

    Raises:
        StormFailure: A read ended in wrong bytes, in another error than mpreader's, or not at all.
    """
    outcomes: list[Outcome] = []
    # torch warns where no process group was set up; the loads of the storm need none.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    while len(outcomes) < schedules:
        number = len(outcomes)
        rng = random.Random(f"{seed} {number}")
        count = min(SCHEDULES_PER_POOL, schedules - number)
        # One setup in four, the first one included, has a checkpoint.
        with _setup(rng, with_checkpoint=number % (4 * SCHEDULES_PER_POOL) == 0) as setup:
            outcomes += [_run_named(setup, rng, f"seed {seed}, schedule {number + index}") for index in range(count)]
    return outcomes


@contextlib.contextmanager
def _setup(rng: random.Random, *, with_checkpoint: bool) -> Iterator[Setup]:
    """Start a server, and a fetcher with small limits, so that schedules are short."""
    files, tensors = make_checkpoint() if with_checkpoint else ({}, {})
    pool_config = PoolConfig(
        workers=rng.choice((1, 2, 3)),
        connections_per_worker=rng.choice((1, 2, 4)),
        max_memory=rng.choice((4, 8, 16)) * MiB,
        part_size=rng.choice((64, 128, 512)) * KiB,
        # Timeouts far below the defaults, so that stalls and stopped workers are dealt with within DEADLINE_S.
        connect_timeout_s=2.0,
        # With the longer one slow answers have mostly been cut before.
        stall_timeout_s=rng.choice((0.3, 0.6)),
        timeout_s=8.0,
        worker_timeout_s=0.6,
        lease_timeout_s=1.0,
    )
    with FaultServer(files, tls=rng.random() < 0.25) as server, _environment(server):
        client_config = S3ClientConfig(
            "us-east-1", endpoint_url=server.endpoint_url, force_path_style=True, max_attempts=8
        )
        with RangeFetcher(client_config, pool_config) as fetcher:
            yield Setup(server, client_config, pool_config, fetcher, tensors)


@contextlib.contextmanager
def _environment(server: FaultServer) -> Iterator[None]:
    """Lead S3 clients, and sources that are URLs, to the server while the block runs."""
    before = dict(os.environ)
    os.environ.update(server.environment())
    if server.ca_file is not None:
        os.environ["REQUESTS_CA_BUNDLE"] = str(server.ca_file)  # for sources that are URLs
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# -- one schedule


def _run_named(setup: Setup, rng: random.Random, name: str) -> Outcome:
    try:
        return _run_schedule(setup, rng)
    except StormFailure as failure:
        raise StormFailure(f"{name}: {failure}") from failure.__cause__


def _run_schedule(setup: Setup, rng: random.Random) -> Outcome:
    is_transient = rng.random() < 0.6
    is_slow = is_transient and rng.random() < 0.4
    plan = choose_plan(setup, rng)
    faults = _choose_slow(rng, plan) if is_slow else _choose_faults(setup, rng, is_transient=is_transient)
    setup.server.inject(*faults)
    for versions in plan.objects:
        setup.server.put(versions.path, versions.contents[0], versions.headers(versions.contents[0]))
    # Kills and overwritten objects may end a read in an error, so schedules whose faults all pass have none.
    disruption = Disruption(setup.server, None if is_transient else rng, plan.objects)
    requests_before, cuts_before = len(setup.server.requests), setup.fetcher.stats.slow_cut
    started = time.monotonic()
    with disruption:
        result = _result_of(plan)
    if is_slow and result != "exact":
        raise StormFailure(f"{plan.name} ended in {result}, though nothing was wrong but that answers were slow")
    return Outcome(
        plan.name,
        result,
        is_transient,
        is_slow,
        faults=sum(request.fault is not None for request in setup.server.requests[requests_before:]),
        cuts=setup.fetcher.stats.slow_cut - cuts_before,
        kills=disruption.kills,
        seconds=time.monotonic() - started,
    )


def _choose_faults(setup: Setup, rng: random.Random, *, is_transient: bool) -> list[Fault]:
    # mpreader gives a part up after three wrong responses in a row. Where a read should survive its faults, they are so
    # rare that hardly any part is struck three times.
    rate = rng.choice((0.0, 0.05, 0.2) if is_transient else (0.0, 0.2, 0.4))
    faults = list(random_faults(rng.randrange(1 << 30), gets=60, rate=rate, kinds=_PASSING_KINDS))
    if setup.checkpoint:
        faults += _choose_flips(rng)
    if not is_transient and rng.random() < 0.5:
        kind, first = rng.choice(_LASTING_KINDS), rng.randrange(1, 10)
        status = rng.choice(_LASTING_STATUSES)
        struck = range(first, first + rng.choice((1, 3, 1000)))
        # First, since of several faults that would strike one request only the first one of the schedule does.
        faults.insert(0, Fault(kind, at=struck, status=status, seconds=0.02, after_bytes=rng.randrange(1 << 16)))
    return faults


def _choose_slow(rng: random.Random, plan: Plan) -> Iterator[Fault]:
    """Choose answers that are slow; most would take hours."""
    rate = rng.choice((0.05, 0.1, 0.2))
    # Not .metadata, which boto3 reads.
    paths = [None] if plan.objects else [f"/storm/checkpoint/__0_{number}.distcp" for number in range(3)]
    for path, number in itertools.product(paths, range(1, 61)):
        if rng.random() < rate:
            kind = rng.choice(_SLOW_KINDS)
            seconds = rng.choice((0.1, 1.0)) if kind in (FaultKind.TRICKLE, FaultKind.SLOW) else _FOR_EVER_S
            after_bytes = rng.choice((0, 1, rng.randrange(1 << 19)))
            yield Fault(kind, at=(number,), path=path, after_bytes=after_bytes, seconds=seconds)


def _choose_flips(rng: random.Random) -> Iterator[Fault]:
    """Choose flipped bits in files of tensors, where a checksum reveals them. Elsewhere nothing could."""
    for number in range(3):
        if rng.random() < 0.3:
            path = f"/storm/checkpoint/__0_{number}.distcp"
            yield Fault(FaultKind.FLIPPED_BIT, at=(1,), path=path, after_bytes=rng.randrange(1 << 18))


def _result_of(plan: Plan) -> str:
    """Carry out a plan in a thread of its own, since it might never end; returns the result as in :class:`Outcome`.

    Raises:
        StormFailure: The bytes were wrong, the error is not one of mpreader's, or the read did not end in time.
    """
    # One entry once the read has ended: its error, or None.
    ends: list[BaseException | None] = []

    def run() -> None:
        try:
            plan.read()
        except BaseException as error:  # noqa: BLE001  # judged by the thread that waits
            ends.append(error)
        else:
            ends.append(None)

    thread = threading.Thread(target=run, daemon=True, name="mpreader-storm")
    thread.start()
    thread.join(DEADLINE_S)
    if not ends:
        raise StormFailure(f"{plan.name} did not end within {DEADLINE_S:g} s")
    error = ends[0]
    if error is None:
        return "exact"
    if isinstance(error, StormFailure):
        raise error
    name = _name_of(error)
    if name is None:
        raise StormFailure(f"{plan.name} ended in {error!r}, which is none of mpreader's errors") from error
    return name


def _name_of(error: BaseException) -> str | None:
    """Name of the class of an error of mpreader's, or of one that it holds; None if it neither is nor holds one."""
    if isinstance(error, MpreaderError):
        return type(error).__name__
    # torch's CheckpointException holds the error of each rank. Of an error about .metadata it keeps the text only, so
    # that is recognised by its words.
    for failure, *_ in getattr(error, "failures", {}).values():
        if isinstance(failure, MpreaderError):
            return type(failure).__name__
        if "metadata read failed: s3://" in str(failure):
            return "error about .metadata"
    return None


# -- for hours


def summary(outcomes: Sequence[Outcome]) -> str:
    """Counts of all outcomes, in some lines."""
    results = collections.Counter(outcome.result for outcome in outcomes)
    transient = [outcome for outcome in outcomes if outcome.is_transient]
    exact = sum(outcome.result == "exact" for outcome in transient)
    slow, cuts = sum(outcome.is_slow for outcome in outcomes), sum(outcome.cuts for outcome in outcomes)
    return "\n".join(
        [
            f"{len(outcomes)} schedules, {sum(outcome.faults for outcome in outcomes)} faults injected, "
            f"{sum(outcome.kills for outcome in outcomes)} workers killed or stopped, "
            f"slowest {max((outcome.seconds for outcome in outcomes), default=0):.1f} s",
            "outcomes: " + ", ".join(f"{name} {count}" for name, count in results.most_common()),
            f"of {len(transient)} schedules whose faults pass, {exact} were exact; in {slow} of them answers were slow",
            f"{cuts} requests were cut",
        ]
    )


def main() -> int:
    """Run until the time is up, or the promise is broken; returns the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default: an hour)")
    parser.add_argument("--ranks", action="store_true", help="loads of several ranks that share a host's read")
    parser.add_argument("--seed", type=int, default=None, help="first seed (default: by chance)")
    parser.add_argument("--schedules", type=int, default=160, help="schedules per seed (default: 160)")
    options = parser.parse_args()
    from scripts.faults import rank_storm  # it imports torch

    # A random seed is printed with each line, so that a failure can be repeated.
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    run, summarize = (rank_storm.run_rank_storm, rank_storm.summary) if options.ranks else (run_storm, summary)
    outcomes: list[Any] = []
    ends = time.monotonic() + options.seconds
    while time.monotonic() < ends:
        try:
            outcomes += run(seed, options.schedules)
        except StormFailure as failure:
            print(f"{summarize(outcomes)}\nFAILED: {failure}", file=sys.stderr)
            return 1
        print(f"seed {seed}: well. So far {summarize(outcomes)}\n", flush=True)
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
