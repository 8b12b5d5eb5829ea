"""Rank of a job: loads when the job says so, and tells what it took. Runs in a process of its own."""

from __future__ import annotations

import logging
import os
import queue
import threading
import traceback
from contextlib import ExitStack, nullcontext
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mpreader.dcp.job import join, load_together, local_bytes, make_targets, wait_for_all
from mpreader.dcp.reader import S3StorageReader
from mpreader.errors import MpreaderError
from mpreader.telemetry.timeline import Timeline, record_timeline
from mpreader.tools.bench.counts import counts_of
from mpreader.tools.ranks.messages import Failed, Go, JobSettings, Loaded, RankFailed, RankLoad, Ready

__all__ = ["run_rank"]

_log = logging.getLogger("mpreader")


def run_rank(rank: int, ranks: int, channel: int, listening: int | None) -> NoReturn:
    """Be a rank until the job ends, which ends this process.

    Args:
        rank: The rank.
        ranks: Number of ranks.
        channel: Descriptor of the socket to the job.
        listening: Descriptor of the socket on which the ranks find each other, in the first rank; else None.
    """
    # As torchrun does: so a rank that does not share takes its part of the host's cores and memory only.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    job = Connection(channel)
    orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(job, orders), daemon=True).start()
    code = 1
    try:
        _serve(rank, ranks, job, orders, listening)
        code = 0
    except Exception as error:  # noqa: BLE001  # the job raises it
        if _log.isEnabledFor(logging.INFO):
            traceback.print_exception(error)
        job.send(Failed(_as_own(rank, error)))
    finally:
        os._exit(code)  # not by destroy_process_group(), in which gloo of torch 2.13 may abort


def _listen(job: Connection, orders: queue.SimpleQueue[Any]) -> None:
    """Take what the job says; if that is no longer there, this process ends, whatever it is doing."""
    try:
        while True:
            orders.put(job.recv())
    finally:
        os._exit(1)


def _serve(rank: int, ranks: int, job: Connection, orders: queue.SimpleQueue[Any], listening: int | None) -> None:
    settings: JobSettings = orders.get()
    if settings.log_level:
        _log_lines(rank, settings.log_level)
    join(rank, ranks, settings.port, listening)
    with ExitStack() as stack:
        targets = make_targets(settings.described, settings.dim)
        reader = stack.enter_context(settings.options.open_reader(settings.uri))
        wait_for_all()
        job.send(Ready())
        while isinstance(orders.get(), Go):
            with record_timeline() if settings.is_recorded else nullcontext(Timeline()) as timeline:
                seconds = load_together(reader, targets)
                wait_for_all()  # so that the host's read is over, and all of its bytes are counted
            job.send(Loaded(_measured(rank, seconds, reader, targets), timeline.recorded))


def _measured(rank: int, seconds: float, reader: S3StorageReader, targets: dict[str, Any]) -> RankLoad:
    stats = reader.stats
    return RankLoad(
        rank=rank,
        seconds=seconds,
        nbytes=local_bytes(targets),
        shared_nbytes=stats.shared_bytes,
        **counts_of(stats),
    )


def _as_own(rank: int, error: Exception) -> MpreaderError:
    """Returns an error that any process can unpickle."""
    if isinstance(error, MpreaderError):
        return error
    return RankFailed(f"rank {rank} has failed: {type(error).__name__}: {error}", rank=rank)


def _log_lines(rank: int, level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    _log.addHandler(handler)
    _log.setLevel(level)
