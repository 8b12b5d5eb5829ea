"""What a pool has done so far, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["PoolStats", "WorkerStats"]


@dataclass(slots=True)
class WorkerStats:
    """What one worker, by its place in the pool, has done.

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
    """What a pool has done.

    Attributes:
        retries: GETs that were made again.
        restarts: Workers that died and were replaced.
        seconds: Time during which somebody was waiting for bytes, summed over the threads that waited.
        workers: The numbers of each worker.
    """

    retries: int = 0
    restarts: int = 0
    seconds: float = 0.0
    workers: tuple[WorkerStats, ...] = field(default=())

    @property
    def bytes(self) -> int:
        """Bytes received by all workers."""
        return sum(worker.bytes for worker in self.workers)

    @property
    def requests(self) -> int:
        """GETs made by all workers."""
        return sum(worker.requests for worker in self.workers)


def total(runs: Iterable[PoolStats]) -> PoolStats:
    """The numbers of several runs of one pool together."""
    runs = list(runs)
    most = max((len(run.workers) for run in runs), default=0)
    workers = tuple(WorkerStats() for _ in range(most))
    for run in runs:
        for ours, theirs in zip(workers, run.workers, strict=False):
            ours.bytes += theirs.bytes
            ours.requests += theirs.requests
            ours.seconds += theirs.seconds
    return PoolStats(
        sum(run.retries for run in runs), sum(run.restarts for run in runs), sum(run.seconds for run in runs), workers
    )
