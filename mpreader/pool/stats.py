"""Statistics of a pool or of one read: public as ``stats`` of readers and fetchers, and the counters behind them."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field

__all__ = ["PoolStats", "Tally", "WorkerStats", "total"]


@dataclass(slots=True)
class WorkerStats:
    """Statistics of one worker, by its place in the pool.

    Attributes:
        bytes: Bytes received, over-read and repeated ones included.
        requests: GETs made.
        seconds: Time in GETs that succeeded, summed over its connections.
    """

    bytes: int = 0
    requests: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Statistics of a pool, or of one read.

    Attributes:
        retries: GETs that were made again.
        slow_cut: GETs that were cut, since they were much slower than others; their rest was requested again.
        restarts: Workers that died and were replaced; 0 for one read.
        seconds: Time of waiting for the network: that in which somebody waited for bytes, summed over the threads
            that waited.
        consumer_seconds: Time of waiting for the consumer: that in which nothing was received, though more was
            wanted, because memory was full of bytes that nobody had taken.
        over_read: Bytes received that nobody had asked for: gaps between ranges that were fetched as one.
        workers: The numbers of each worker.
        verified_bytes: Bytes of the items of a load whose checksum was compared.
        unverified_bytes: Bytes of the items of a load whose checksum was not compared: those of which a part was
            received only, those that have none, and all of them where that was not asked for.
        shared_bytes: Bytes of a load that another rank of this host has received; they are not in ``bytes``.
    """

    retries: int = 0
    restarts: int = 0
    seconds: float = 0.0
    consumer_seconds: float = 0.0
    over_read: int = 0
    workers: tuple[WorkerStats, ...] = field(default=())
    slow_cut: int = 0
    verified_bytes: int = 0
    unverified_bytes: int = 0
    shared_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes received by all workers."""
        return sum(worker.bytes for worker in self.workers)

    @property
    def requests(self) -> int:
        """GETs made by all workers."""
        return sum(worker.requests for worker in self.workers)

    def __str__(self) -> str:
        """For a log: one line."""
        share = 100 * self.over_read / self.bytes if self.bytes else 0.0
        cut = f", {self.slow_cut} slow ones cut" if self.slow_cut else ""
        verified = ""
        if self.verified_bytes or self.unverified_bytes:
            verified = f"; {self.verified_bytes} bytes were verified, {self.unverified_bytes} were not"
        return (
            f"{self.bytes} bytes in {self.requests} requests by {len(self.workers)} workers, "
            f"{self.retries} retries{cut}, "
            f"{self.over_read} bytes over-read ({share:.1f} %), waited {self.seconds:.2f} s for the network and "
            f"{self.consumer_seconds:.2f} s for the consumer{verified}"
        )


class Tally:
    """Counters of a :class:`PoolStats`.

    There is no lock of its own: ``seconds`` is written under the lock of the transfer that counts, and all the rest by
    the coordinator's thread.
    """

    __slots__ = ("consumer_seconds", "over_read", "retries", "seconds", "slow_cut", "workers")

    def __init__(self) -> None:
        self.retries = 0
        self.slow_cut = 0
        self.seconds = 0.0
        self.consumer_seconds = 0.0
        self.over_read = 0
        self.workers: list[WorkerStats] = []

    def note(self, worker: int, nbytes: int, seconds: float) -> None:
        """Count a request of a worker that has ended."""
        while len(self.workers) <= worker:
            self.workers.append(WorkerStats())
        stats = self.workers[worker]
        stats.requests += 1
        stats.bytes += nbytes
        stats.seconds += seconds

    def stats(self, restarts: int = 0) -> PoolStats:
        """The numbers now."""
        return PoolStats(
            self.retries,
            restarts,
            self.seconds,
            self.consumer_seconds,
            self.over_read,
            tuple(map(copy, self.workers)),
            self.slow_cut,
        )


def total(runs: Iterable[PoolStats]) -> PoolStats:
    """The numbers of several runs together."""
    runs = list(runs)
    workers = tuple(WorkerStats() for _ in range(max((len(run.workers) for run in runs), default=0)))
    for run in runs:
        for ours, theirs in zip(workers, run.workers, strict=False):
            ours.bytes += theirs.bytes
            ours.requests += theirs.requests
            ours.seconds += theirs.seconds
    return PoolStats(
        sum(run.retries for run in runs),
        sum(run.restarts for run in runs),
        sum(run.seconds for run in runs),
        sum(run.consumer_seconds for run in runs),
        sum(run.over_read for run in runs),
        workers,
        sum(run.slow_cut for run in runs),
        sum(run.verified_bytes for run in runs),
        sum(run.unverified_bytes for run in runs),
        sum(run.shared_bytes for run in runs),
    )
