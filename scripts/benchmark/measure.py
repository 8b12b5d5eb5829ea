"""One measurement: a process that does the same thing twice, and the time, memory and requests of each.

The process is forked from this one, which has imported torch and started no thread. Per run::

    parent                           child
      <── "ready" ──── libraries imported, targets made, memory and CPU noted
      ── "go" ──>      the run, timed
      <── Result ──    then the next one
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final
from unittest.mock import patch

from cells import FETCHES, TENSORS
from memory import Memory
from names import resolve_in_this_process
from private import NotReplaced
from tasks import Job, Task
from tree import tree_cpu_s
from trust import trust_in_this_process

from mpreader.testing.s3_server import aws_environment

__all__ = ["RUNS", "Failure", "Run", "TooSlow", "as_json", "measure", "set_environment"]

RUNS: Final = ("first", "again")
LIMIT_S: Final = 60.0
_PREPARING_S: Final = 120.0
_PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy")
# Contenders that trust the system's authorities only: all of them use s3torchconnector's client.
_SYSTEM_TRUST: Final = ("drop-in", "dcp_optimized", "sequential", "range_based", "s3torchconnector")


class TooSlow(Exception):
    """A run took longer than ``LIMIT_S``, and was ended; the exception's ``runs`` ended before."""

    runs: Sequence[Run] = ()


class Failure(Exception):
    """A run failed; the message is the child's traceback."""


@dataclass(slots=True)
class Run:
    """Measurements of one run.

    Attributes:
        name: ``"first"`` or ``"again"``.
        seconds: Wall time.
        cpu_s: CPU time of the process and its descendants.
        peak_extra_bytes: Most memory at one time beyond what there was before, targets not counted; None where
            memory was not sampled.
        samples: ``(seconds, extra bytes)``; empty where memory was not sampled.
        requests: Requests that the server got.
        served_bytes: Bytes of the bodies that the server sent; 0 if it keeps no count.
        cuts: Requests that mpreader cut, since they were slower than others.
    """

    name: str
    seconds: float
    cpu_s: float
    peak_extra_bytes: int | None = None
    samples: list[tuple[float, int]] = field(default_factory=list)
    requests: int = 0
    served_bytes: int = 0
    cuts: int = 0


def measure(job: Job, limit_s: float = LIMIT_S, runs: Sequence[str] = RUNS) -> list[Run]:
    """Run a job in a new process, twice.

    Args:
        job: The job.
        limit_s: Most seconds of a run.
        runs: Names of the runs; with one name it is run once.

    Raises:
        TooSlow: A run took longer than ``limit_s``.
        Failure: It raised something.
        NotReplaced: The process can't be told whom to trust, or where the server is.
    """
    # A fork copies the calling thread only: locks that another one holds would be held for ever.
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("this process has threads: forking it is not safe")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(job, theirs, ours))
    process.start()
    theirs.close()  # else the end of the child would not end the pipe
    ended: list[Run] = []
    try:
        for name in runs:
            run = _run(job, ours, name, limit_s)
            ended.append(run)
        return ended
    except TooSlow as error:
        error.runs = ended
        raise
    finally:
        ours.close()
        process.join(5)
        # Its group (see _serve), with all processes that it has left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()


def _run(job: Job, child: Connection, name: str, limit_s: float) -> Run:
    _receive(child, _PREPARING_S)
    # Between "ready" and "go", when the child sends no requests.
    mark = job.site.mark()
    child.send("go")
    run = Run(name, **_receive(child, limit_s))
    run.requests, run.served_bytes = job.site.served_since(mark)
    return run


def _receive(child: Connection, limit_s: float) -> Any:
    if not child.poll(limit_s):
        raise TooSlow
    try:
        message = child.recv()
    except EOFError:
        raise Failure("the process died") from None
    if isinstance(message, Exception):
        raise message
    return message


# -- the child


def _serve(job: Job, parent: Connection, other_end: Connection) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler, which cleans up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the whole group
    other_end.close()
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent has given up
        try:
            _run_twice(job, parent)
        except NotReplaced as error:
            parent.send(error)
        except Exception:  # noqa: BLE001  # the parent raises it
            parent.send(Failure(traceback.format_exc()))


def _run_twice(job: Job, parent: Connection) -> None:
    set_environment(job)
    if not job.cutting:
        _switch_cutting_off()
    task = _make_task(job)
    memory = Memory(enabled=job.checking)
    for _ in RUNS:
        task.prepare()
        with memory.sampled(task.target_ranges) as sampled:
            parent.send("ready")
            parent.recv()
            taken = _time(task)
        if job.checking:  # after the time was taken
            task.check()
        parent.send(taken | sampled)
    task.close()


def _time(task: Task) -> dict[str, Any]:
    cpu, started = tree_cpu_s(os.getpid()), time.perf_counter()
    task.run()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_s": tree_cpu_s(os.getpid()) - cpu, "cuts": task.cuts}


def _switch_cutting_off() -> None:
    from mpreader.pool.coordinator.tail import SlowTail

    # The coordinator is a thread of this process. It still takes what its workers report, and finds nothing slow.
    patch.object(SlowTail, "judge", lambda tail, parts, now: tail.in_flight.report(parts, now)[:0]).start()


def _make_task(job: Job) -> Task:
    if job.workload in FETCHES or job.contender == "obstore":
        from fetches import FetchTask

        return FetchTask(job)
    if job.workload in TENSORS:
        from tensors import TensorTask

        return TensorTask(job)
    from loads import LoadTask, warm_up

    task = LoadTask(job)
    warm_up(job)
    return task


def set_environment(job: Job) -> None:
    """Make the environment of the calling process that of a contender, and no setting of the user's."""
    for name in list(os.environ):
        # Settings of the user would change the measurement; s3torchconnector uses a proxy even for this machine.
        if name.startswith(("AWS_", "MPREADER_", "RUNAI_")) or name.lower() in _PROXIES:
            del os.environ[name]
    os.environ.update(aws_environment(job.site.endpoint_url, job.site.ca_file))
    if job.site.addresses:
        resolve_in_this_process(job.site.host, job.site.addresses)
    if job.site.ca_file is not None:
        os.environ["SSL_CERT_FILE"] = str(job.site.ca_file)  # for obstore
        if job.contender in _SYSTEM_TRUST:
            trust_in_this_process(job.site.ca_file)


def as_json(run: Run) -> dict[str, Any]:
    """A run for the results file, without the samples."""
    return {name: value for name, value in asdict(run).items() if name != "samples"}
