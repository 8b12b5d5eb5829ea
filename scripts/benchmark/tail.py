"""The slow tail: what loads take from servers of which some answers, connections or addresses are slow.

Each case measures every contender with the tail and without, interleaved, from the same kind of server. The figures are
ratios: 1.3 means that the tail makes a load take 1.3 times as long. tail_report.py prints, draws and writes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from measure import RUNS, Failure, Run, TooSlow, measure
from pauses import paused_twice
from private import NotReplaced
from servers import Servers
from tasks import Job, announced

__all__ = ["CASES", "CHECKPOINTS", "Case", "Pair", "Setting", "Tail", "measure_tail"]

CHECKPOINTS: Final = {"a", "small"}
# A run that takes longer is ended, and counts as one of this time. A contender of which no run with the tail ends in a
# round has no further rounds: it is far off, and they would take most of the time.
LIMIT_S: Final = 20.0
# Who loads, and what: obstore knows no checkpoints, and fetches the same files.
_LOAD: Final = {"mpreader": "a", "dcp_optimized": "a", "obstore": "f"}
_SMALL: Final = {"mpreader": "small"}  # of many files, so that the rate of a connection does not make it last
_SCATTERED: Final = {"mpreader": "g", "s3torchconnector": "g", "obstore": "g"}


class _NoServer(Exception):
    """No server of that kind runs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Circumstances of a measurement.

    Attributes:
        site: Name of the server.
        pausing: True: the whole server pauses twice.
        cutting: False: mpreader cuts no slow requests.
    """

    site: str
    pausing: bool = False
    cutting: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured together.

    Attributes:
        key: Its number, for the command line.
        title: What the tail is.
        tail: Circumstances with the tail.
        without: Circumstances without it; None: there is no tail, a process's first run is compared with its second.
        work: Workload of each contender.
        runs: Runs of each process.
        limit_s: Most seconds of a run.
    """

    key: str
    title: str
    tail: Setting
    without: Setting | None
    work: Mapping[str, str] = field(default_factory=lambda: _LOAD)
    runs: tuple[str, ...] = RUNS
    limit_s: float = LIMIT_S


_ALL_SLOW: Final = Setting("all-slow")
CASES: Final = (
    Case("1", "2 % of answers at 200 kB/s", Setting("some-slow"), Setting("slow90")),
    Case("2", "1 % of answers wait 5 s", Setting("some-late"), Setting("steady")),
    Case("3", "1 % of connections go silent", Setting("some-silent"), Setting("steady")),
    Case("4", "all answers at 200 kB/s", _ALL_SLOW, replace(_ALL_SLOW, cutting=False), _SMALL, RUNS[:1], 60.0),
    Case("5", "the server pauses for 3 s, twice", Setting("plain", pausing=True), Setting("plain"), runs=RUNS[:1]),
    Case("6", "one of four addresses is slow", Setting("address-slow"), Setting("addresses")),
    Case("7", "one of four addresses refuses", Setting("address-refuses"), Setting("addresses")),
    Case("8", "first load of a process", Setting("plain"), None),
    Case("9", "first fetch of a process, scattered", Setting("plain"), None, _SCATTERED),
)


@dataclass(slots=True)
class Pair:
    """Runs of one contender in one round.

    Attributes:
        tail: Runs with the tail, or all of them.
        without: Runs without the tail; none if there is nothing of the kind.
    """

    tail: list[Run] = field(default_factory=list)
    without: list[Run] = field(default_factory=list)


@dataclass(slots=True)
class Tail:
    """All runs of one contender in one case.

    Attributes:
        case: The case.
        contender: The contender.
        rounds: Its rounds.
        note: Reason, in words, for which it was not run; empty if it was.
    """

    case: Case
    contender: str
    rounds: list[Pair] = field(default_factory=list)
    note: str = ""

    @property
    def is_over(self) -> bool:
        """True if it is not worth another round."""
        return bool(self.note) or any(
            all(run.seconds >= self.case.limit_s for run in pair.tail) for pair in self.rounds
        )


def measure_tail(
    servers: Servers, data: Path, cases: Collection[str], contenders: Collection[str], rounds: int
) -> list[Tail]:
    """Measure cases; returns the runs of each contender, in the order of the cases.

    Args:
        servers: The servers, with those of the tail.
        data: Folder that they serve.
        cases: Keys of the cases; empty: all.
        contenders: Contenders; empty: all.
        rounds: Rounds of each.
    """
    tails = [
        Tail(case, contender)
        for case in CASES
        for contender in case.work
        if (not cases or case.key in cases) and (not contenders or contender in contenders)
    ]
    for number in announced(range(1, rounds + 1)):
        for tail in tails:
            if not tail.is_over:
                _measure_pair(tail, servers, data, number)
    return tails


def _measure_pair(tail: Tail, servers: Servers, data: Path, number: int) -> None:
    """Measure a contender with the tail and without, in another order each time."""
    pair = Pair()
    settings = [(tail.case.tail, pair.tail)]
    if tail.case.without is not None:
        settings.append((tail.case.without, pair.without))
    try:
        for setting, runs in settings[:: 1 if number % 2 else -1]:
            runs += _measure(tail, setting, servers, data)
    except (_NoServer, NotReplaced, Failure) as error:
        # That a contender does not survive the tail is a result, too.
        tail.note = "failed" if isinstance(error, Failure) else "not run"
        print(f"  {tail.case.title}, {tail.contender}: {tail.note}: {error}", flush=True)
        return
    tail.rounds.append(pair)
    told = " with, ".join(", ".join(f"{run.seconds:.2f} s" for run in runs) for runs in (pair.tail, pair.without))
    print(f"  {tail.case.title}, {tail.contender}: {told} without", flush=True)


def _measure(tail: Tail, setting: Setting, servers: Servers, data: Path) -> list[Run]:
    site = servers.sites.get(setting.site)
    if site is None:
        raise _NoServer("nginx is not installed")
    job = Job(tail.contender, tail.case.work[tail.contender], False, site, data, False, cutting=setting.cutting)
    pauses = paused_twice(site, servers.pid) if setting.pausing else contextlib.nullcontext()
    try:
        with pauses:
            return measure(job, tail.case.limit_s, tail.case.runs)
    except TooSlow as error:
        # The runs after it were not made, and count as no faster.
        missing = tail.case.runs[len(error.runs) :]
        return [*error.runs, *(Run(name, tail.case.limit_s, 0.0) for name in missing)]
