"""Group of ranks: processes that load the same thing together, twice, and are measured meanwhile.

ranks.py and tensor_loads.py say what they load. Per run::

    parent                           each rank
      <── "ready" ───  what it needs is there
      ── "go" ──>      the load, timed
      <── seconds ───
      ── "check" ──>   bytes are compared, in a round in which that is asked for
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final, NoReturn

from measure import RUNS, Failure, TooSlow
from tasks import Job
from tree import Taken, memory_of

from mpreader.tools.bench.memory import process_tree

__all__ = ["LIMIT_S", "RanksRun", "measure_group"]

LIMIT_S: Final = 120.0
_SAMPLE_S: Final = 0.02
Body = Callable[[int, Connection], None]


@dataclass(slots=True)
class RanksRun:
    """Measurements of one load by all ranks.

    Attributes:
        name: ``"first"`` or ``"again"``.
        seconds: Wall time of the slowest rank.
        requests: Requests that the server got.
        served_bytes: Bytes of the bodies that it sent.
        peak_extra_bytes: Most memory of all ranks and their workers at one time beyond what there was before the first
            load, with the targets; None where memory was not sampled.
        peak_shared_bytes: Most shared memory of them at one time, targets not counted; None where it was not sampled.
    """

    name: str
    seconds: float
    requests: int
    served_bytes: int
    peak_extra_bytes: int | None = None
    peak_shared_bytes: int | None = None


def measure_group(job: Job, count: int, body: Body) -> list[RanksRun]:
    """Start the ranks, let them load twice, and end them.

    Args:
        job: What they do.
        count: Number of ranks.
        body: What each of them runs, in a fork of this process, with its number and its connection to this process.

    Raises:
        TooSlow: A load took longer than ``LIMIT_S``.
        Failure: A rank has failed.
    """
    # A fork copies the calling thread only: locks that another one holds would be held for ever.
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("this process has threads: forking it is not safe")
    context = multiprocessing.get_context("fork")
    pairs = [multiprocessing.Pipe() for _ in range(count)]
    ours = [our for our, _ in pairs]
    processes = []
    for rank, (_, their) in enumerate(pairs):
        others = [end for pair in pairs for end in pair if end is not their]
        processes.append(context.Process(target=_serve, args=(body, rank, their, others)))
        processes[-1].start()
    for _, their in pairs:
        their.close()
    try:
        return _runs(ours, job, [process.pid or 0 for process in processes])
    finally:
        _end(ours, processes)


def _serve(body: Body, rank: int, parent: Connection, others: Sequence[Connection]) -> NoReturn:
    """Be a rank until the parent closes the connection."""
    os.setpgid(0, 0)
    for other in others:
        other.close()
    try:
        body(rank, parent)
    except (EOFError, ConnectionError):
        os._exit(0)  # the parent has heard enough
    except BaseException:  # noqa: BLE001  # the parent raises it
        parent.send(Failure(traceback.format_exc()))
    os._exit(1)


def _runs(ranks: Sequence[Connection], job: Job, pids: Sequence[int]) -> list[RanksRun]:
    runs: list[RanksRun] = []
    before: Taken | None = None
    for name in RUNS:
        _answers(ranks)  # in the round in which bytes are compared also that those of the run before were right
        mark = job.site.mark()
        if job.checking and before is None:
            before = _taken(pids)
        for rank in ranks:
            rank.send("go")
        samples: list[Taken] = []
        seconds = max(_answers(ranks, (samples, pids) if job.checking else None))
        if job.checking:
            for rank in ranks:
                rank.send("check")
        run = RanksRun(name, seconds, *job.site.served_since(mark))
        if before is not None:
            run.peak_extra_bytes = max(sum(taken) - sum(before) for taken in samples)
            run.peak_shared_bytes = max(taken.shared - before.shared for taken in samples)
        runs.append(run)
    if job.checking:
        _answers(ranks)  # that the bytes of the last run were right
    return runs


def _answers(ranks: Sequence[Connection], sampling: tuple[list[Taken], Sequence[int]] | None = None) -> list[Any]:
    """The next message of each rank; meanwhile memory is sampled, if that is asked for."""
    answers: dict[int, Any] = {}
    until = time.monotonic() + LIMIT_S
    while len(answers) < len(ranks):
        left = [rank for number, rank in enumerate(ranks) if number not in answers]
        if sampling is not None:
            sampling[0].append(_taken(sampling[1]))
        ready = wait(left, _SAMPLE_S if sampling is not None else until - time.monotonic())
        if time.monotonic() > until:
            raise TooSlow
        for rank in ready:
            answers[ranks.index(rank)] = _receive(rank)  # type: ignore[arg-type]
    return [answers[number] for number in range(len(ranks))]


def _receive(rank: Connection) -> Any:
    try:
        message = rank.recv()
    except (EOFError, ConnectionResetError):
        raise Failure("a rank died") from None
    if isinstance(message, Exception):
        raise message
    return message


def _taken(pids: Sequence[int]) -> Taken:
    return memory_of(pid for rank in pids for pid in process_tree(rank))


def _end(ranks: Sequence[Connection], processes: Sequence[Any]) -> None:
    for rank in ranks:
        rank.close()
    for process in processes:
        process.join(2)
        # Its group, with all processes that it has left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
