"""Ranks of one host that load the same checkpoint: what the host receives, and what that takes.

Each case measures every contender, interleaved, in processes that load twice: with all that the first load starts, and
again with new readers. Bytes are those that the server sent, by its log. ranks_report.py prints, draws and writes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import mmap
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from checkpoints import BUCKET, Checkpoint
from group import LIMIT_S, RanksRun, measure_group
from measure import Failure, TooSlow
from rank import Layout, RankJob, run_rank
from servers import Servers, Site, spawned
from tasks import Job, announced

__all__ = ["CASES", "CHECKPOINTS", "RANK_CONTENDERS", "RankCase", "Ranks", "measure_ranks"]

CHECKPOINTS: Final = {"a", "ranks", "ranks3"}
RANK_CONTENDERS: Final = ("mpreader", "alone", "dcp_optimized", "s3fs")
_SLOW: Final = "s3fs"  # it is measured once, and not behind the link
LINK_BYTES_PER_S: Final = 200_000_000


@dataclass(frozen=True, slots=True)
class RankCase:
    """What is loaded.

    Attributes:
        key: Its name, for the command line.
        title: What it is.
        ranks: Number of ranks.
        layout: How the tensors are on them.
        checkpoint: Name of the checkpoint.
        link: True: the host has a link of ``LINK_BYTES_PER_S``.
        one_memory: True: the targets of all ranks are the same memory, so that those of many ranks fit.
        is_timed: False: only its memory is measured.
        others_once: True: contenders that don't share have one round, since it takes long.
    """

    key: str
    title: str
    ranks: int = 4
    layout: Layout = field(default_factory=Layout)
    checkpoint: str = "ranks"
    link: bool = False
    one_memory: bool = False
    is_timed: bool = True
    others_once: bool = False


CASES: Final = (
    RankCase("replica", "replicated, 4 ranks"),
    RankCase("hsdp", "HSDP 2 x 2", layout=Layout((2, 2), (None, 0))),
    RankCase("columns", "columns, 4 ranks", layout=Layout((4,), (1,))),
    RankCase("rows", "rows, 4 ranks", layout=Layout((4,), (0,))),
    RankCase("3to4", "rows, saved by 3 ranks, 4 ranks", layout=Layout((4,), (0,)), checkpoint="ranks3"),
    RankCase("link1", "link of 200 MB/s, 1 rank", ranks=1, link=True),
    RankCase("link8", "link of 200 MB/s, replicated, 8 ranks", ranks=8, link=True, others_once=True),
    RankCase("one", "1.2 GB, 1 rank", ranks=1, checkpoint="a", one_memory=True, is_timed=False),
    RankCase("eight", "1.2 GB, replicated, 8 ranks", ranks=8, checkpoint="a", one_memory=True, is_timed=False),
)


@dataclass(slots=True)
class Ranks:
    """All runs of one contender in one case.

    Attributes:
        case: The case.
        contender: The contender.
        needed_bytes: Bytes of the tensors, each once: what the host needs.
        rounds: The timed runs of each round.
        check: Runs of the round in which bytes were compared and memory was sampled.
        note: Reason, in words, for which it has no runs, or no more; empty if it has all.
    """

    case: RankCase
    contender: str
    needed_bytes: int
    rounds: list[list[RanksRun]] = field(default_factory=list)
    check: list[RanksRun] = field(default_factory=list)
    note: str = ""

    def is_due(self, number: int) -> bool:
        """True if it is measured in this round; in round 0 bytes are compared and memory is sampled."""
        if self.note:
            return False
        if self.contender == _SLOW:
            return number == 1 and self.case.is_timed and not self.case.link
        if number == 0:
            return not self.case.link
        return self.case.is_timed and (number == 1 or self.contender == "mpreader" or not self.case.others_once)

    def as_json(self) -> dict[str, Any]:
        """All of it, for the results file."""
        return asdict(self)


def measure_ranks(
    servers: Servers, data: Path, cases: Collection[str], contenders: Collection[str], rounds: int
) -> list[Ranks]:
    """Measure cases; returns the runs of each contender, in the order of the cases.

    Args:
        servers: The servers.
        data: Folder that they serve.
        cases: Keys of the cases; empty: all.
        contenders: Contenders; empty: all.
        rounds: Timed rounds of each. One more comes first, in which bytes are compared and memory is sampled.
    """
    measured = [
        Ranks(case, contender, _needed_bytes(data, case.checkpoint))
        for case in CASES
        for contender in RANK_CONTENDERS
        if (not cases or case.key in cases) and (not contenders or contender in contenders)
    ]
    _import_contenders()
    with _link(servers.sites["plain"]) as link:
        for number in announced(range(rounds + 1)):
            for ranks in measured[:: 1 if number % 2 else -1]:
                site = link if ranks.case.link else servers.sites["plain"]
                if ranks.is_due(number):
                    _measure_into(ranks, site, data, checking=number == 0)
    return measured


def _import_contenders() -> None:
    """Import here, once, what each rank would take seconds to import; a rank is a fork of this process."""
    for name in ("mpreader.dcp", "s3torchconnector.dcp", "torch.distributed.tensor"):
        importlib.import_module(name)
    gc.freeze()  # else a collection in a rank would copy, page by page, all of it


def _needed_bytes(data: Path, checkpoint: str) -> int:
    shapes = Checkpoint(data / BUCKET / checkpoint).shapes.values()
    return sum(2 * math.prod(shape) for shape in shapes)


@contextlib.contextmanager
def _link(site: Site) -> Iterator[Site]:
    """The same server behind a link; its log is the same, too."""
    port = site.endpoint_url.rpartition(":")[2]
    command = [sys.executable, str(Path(__file__).with_name("link.py")), port, str(LINK_BYTES_PER_S)]
    with spawned(command) as first_line:
        yield replace(site, name="link", endpoint_url=f"http://127.0.0.1:{first_line}")


def _measure_into(ranks: Ranks, site: Site, data: Path, *, checking: bool) -> None:
    job = Job(ranks.contender, ranks.case.checkpoint, False, site, data, checking)
    try:
        runs = _measure(ranks.case, job)
    except TooSlow:
        ranks.note = f"> {LIMIT_S:.0f} s"
    except Failure as error:
        ranks.note = str(error).strip().splitlines()[-1][:100]
        print(f"{ranks.contender}, {ranks.case.key}: {error}", flush=True)
    else:
        if checking:
            ranks.check = runs
        else:
            ranks.rounds.append(runs)
        print(f"  {ranks.case.key:8} {ranks.contender:14}", *(f"{run.seconds:6.2f} s" for run in runs), flush=True)


def _measure(case: RankCase, job: Job) -> list[RanksRun]:
    with tempfile.TemporaryDirectory() as folder:
        memory = mmap.mmap(-1, _needed_bytes(job.data, case.checkpoint)) if case.one_memory else None
        rank_job = RankJob(job, case.ranks, case.layout, f"{folder}/store", memory)
        try:
            return measure_group(job, case.ranks, partial(run_rank, rank_job))
        finally:
            if memory is not None:
                memory.close()
