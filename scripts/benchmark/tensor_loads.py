"""Loads of safetensors files: mpreader, Run:ai's streamer and bare sockets, from the same server, interleaved.

Each case measures every contender in processes that load twice. Every result is compared once, in a round of its own,
in which memory is sampled, too. tensors.py and tensor_rank.py load; tensor_report.py prints, draws and writes.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from cells import TENSORS
from checkpoints import BUCKET, Checkpoint, checkpoint_of
from group import RanksRun, measure_group
from measure import Failure, Run, TooSlow, as_json, measure
from servers import Servers, Site
from tasks import Job, announced
from tensor_rank import RANKS, TensorRankJob, run_tensor_rank
from tensors import SHARES

__all__ = ["CHECKPOINTS", "TENSOR_CASES", "TENSOR_CONTENDERS", "TensorCase", "TensorRuns", "measure_tensors"]

CHECKPOINTS: Final = {"safetensors", "safetensors-many"}
TENSOR_CONTENDERS: Final = ("mpreader", "runai", "runai-clone", "floor", "floor-private")
_LIBRARIES: Final = TENSOR_CONTENDERS[:3]
_LIMIT_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class TensorCase:
    """What is measured together.

    Attributes:
        key: Its name, for the command line.
        title: What it is.
        workload: Key of ``TENSORS``.
        contenders: Who loads.
        site: Name of the server.
        ranks: Number of processes that load together, each its rows; 1: one process loads.
    """

    key: str
    title: str
    workload: str
    contenders: tuple[str, ...]
    site: str = "plain"
    ranks: int = 1


TENSOR_CASES: Final = (
    TensorCase("whole", TENSORS["whole"], "whole", TENSOR_CONTENDERS),
    TensorCase("far", "1.26 GB, 90 MB/s a connection, 30 ms to the first byte", "whole", _LIBRARIES, "far"),
    TensorCase("many", TENSORS["many"], "many", _LIBRARIES),
    TensorCase("streamed", TENSORS["streamed"], "streamed", _LIBRARIES[:2]),
    TensorCase("half", TENSORS["half"], "half", _LIBRARIES[:2]),
    TensorCase("rows", TENSORS["rows"], "rows", _LIBRARIES[:1]),
    TensorCase("ranks", f"{RANKS} ranks, each a quarter of the rows", "whole", _LIBRARIES[:2], ranks=RANKS),
)


@dataclass(slots=True)
class TensorRuns:
    """All runs of one contender in one case.

    Attributes:
        case: The case.
        contender: The contender.
        needed_bytes: Bytes of what is loaded, by all ranks together.
        rounds: The timed runs of each round.
        check: Runs of the round in which bytes were compared and memory was sampled.
        note: Reason, in words, for which it has no runs, or no more; empty if it has all.
    """

    case: TensorCase
    contender: str
    needed_bytes: int
    rounds: list[list[Run | RanksRun]] = field(default_factory=list)
    check: list[Run | RanksRun] = field(default_factory=list)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """All of it, for the results file."""
        return {
            "case": asdict(self.case),
            "contender": self.contender,
            "needed_bytes": self.needed_bytes,
            "note": self.note,
            "check": [_run_json(run) for run in self.check],
            "rounds": [[_run_json(run) for run in runs] for runs in self.rounds],
        }


def _run_json(run: Run | RanksRun) -> dict[str, Any]:
    return as_json(run) if isinstance(run, Run) else asdict(run)


def measure_tensors(
    servers: Servers, data: Path, cases: Collection[str], contenders: Collection[str], rounds: int
) -> list[TensorRuns]:
    """Measure cases; returns the runs of each contender, in the order of the cases.

    Args:
        servers: The servers.
        data: Folder that they serve.
        cases: Keys of the cases; empty: all.
        contenders: Contenders; empty: all.
        rounds: Timed rounds of each. One more comes first, in which bytes are compared and memory is sampled.
    """
    measured = [
        TensorRuns(case, contender, _needed_bytes(data, case.workload))
        for case in TENSOR_CASES
        for contender in case.contenders
        if (not cases or case.key in cases) and (not contenders or contender in contenders)
    ]
    # Once, here, what each measured process would take seconds to import; it is a fork of this one.
    importlib.import_module("mpreader.safetensors")
    gc.freeze()  # else a collection in a fork would copy, page by page, all of it
    for number in announced(range(rounds + 1)):
        for runs in measured[:: 1 if number % 2 else -1]:
            if not runs.note:
                _measure_into(runs, servers.sites[runs.case.site], data, checking=number == 0)
    return measured


def _needed_bytes(data: Path, workload: str) -> int:
    return int(Checkpoint(data / BUCKET / checkpoint_of(workload)).tensor_bytes * SHARES.get(workload, 1))


def _measure_into(runs: TensorRuns, site: Site, data: Path, *, checking: bool) -> None:
    job = Job(runs.contender, runs.case.workload, True, site, data, checking)
    try:
        found = _measure(runs.case, job)
    except TooSlow:
        runs.note = "too slow"
    except Failure as error:
        runs.note = str(error).strip().splitlines()[-1][:100]
        print(f"{runs.contender}, {runs.case.key}: {error}", flush=True)
    else:
        if checking:
            runs.check = found
        else:
            runs.rounds.append(found)
        print(f"  {runs.case.key:8} {runs.contender:13}", *(f"{run.seconds:6.2f} s" for run in found), flush=True)


def _measure(case: TensorCase, job: Job) -> list[Run | RanksRun]:
    if case.ranks == 1:
        return list(measure(job, _LIMIT_S))
    with tempfile.TemporaryDirectory() as folder:
        return list(measure_group(job, case.ranks, partial(run_tensor_rank, TensorRankJob(job, f"{folder}/store"))))
