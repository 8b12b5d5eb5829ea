"""Measurements of pool settings: a source is read with given settings, its bytes are dropped at once, and it is timed.

This module is responsible for one measurement; :mod:`mpreader.tools.bench.sweep` decides which settings are measured,
and how often. The clock starts when the workers are up and connected, since settings are compared, not the start of
processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from mpreader.config import KiB, PoolConfig, S3ClientConfig, format_bytes
from mpreader.errors import PoolTimeout
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.tools.bench.memory import process_tree, stat_fields, tree_memory_bytes
from mpreader.tools.bench.objects import SourceObject, passes

__all__ = ["Benchmark", "Measurement", "Settings"]

_WARM_UP_BYTES: Final = 64 * KiB  # for each connection
_WARM_UP_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Fields of ``PoolConfig`` that a sweep varies, sizes in bytes."""

    workers: int
    connections_per_worker: int
    part_size: int

    @property
    def connections(self) -> int:
        """Connections of all workers."""
        return self.workers * self.connections_per_worker

    @property
    def cost(self) -> tuple[int, int, int]:
        """Sort key, leaner settings first: fewer connections, then less memory in flight, then fewer processes."""
        return self.connections, self.connections * self.part_size, self.workers

    def environment(self) -> dict[str, str]:
        """The environment variables that make these settings the defaults."""
        values = {**asdict(self), "part_size": format_bytes(self.part_size)}
        return {f"MPREADER_{name.upper()}": str(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed reading of a source.

    Attributes:
        nbytes: Bytes that were received and dropped.
        seconds: Wall time, planning and HEAD requests included.
        cpu_seconds: Processor time of this process and the workers.
        requests: GETs made.
        retries: GETs that were made again.
        memory_bytes: Memory that workers and shared memory have taken, the latter counted once.
    """

    nbytes: int
    seconds: float
    cpu_seconds: float
    requests: int
    retries: int
    memory_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9 bytes) per second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds per gigabyte; 0 if nothing was received."""
        return self.cpu_seconds / self.nbytes * 1e9 if self.nbytes else 0.0


class Benchmark:
    """Measures settings on one source, each time with the same number of bytes.

    Args:
        objects: The objects that are read.
        nbytes: Bytes of each measurement.
        share_s: Seconds that one measurement should take at most: its share of the time for all repetitions.
        s3client_config: Settings of the S3 client.

    Attributes:
        nbytes: Bytes of each measurement; :meth:`calibrate` may lower it.
    """

    def __init__(
        self, objects: Sequence[SourceObject], nbytes: int, share_s: float, s3client_config: S3ClientConfig
    ) -> None:
        self.nbytes = nbytes
        self._objects = objects
        self._share_s = share_s
        self._s3client_config = s3client_config

    def calibrate(self, settings: Settings, on_bytes: Callable[[int], object]) -> None:
        """Lower ``nbytes`` to the number of bytes that these settings read in the time for one measurement.

        Args:
            settings: Settings of the pool, the defaults of the host usually.
            on_bytes: Is called with the number of bytes of each piece that was read.

        Raises:
            PoolTimeout: Not one part was received.
        """
        self.nbytes = self._timed(settings, self._share_s, on_bytes).nbytes
        if not self.nbytes:
            raise PoolTimeout(
                f"not one part was received in {self._share_s:.3g} s: allow more seconds, or smaller parts"
            )

    def measure(self, settings: Settings, on_bytes: Callable[[int], object]) -> Measurement:
        """Measure once; a measurement is cut off after twice its share of the time.

        Args:
            settings: Settings of the pool.
            on_bytes: Is called with the number of bytes of each piece that was read. The numbers add up to ``nbytes``,
                also if the measurement was cut off.
        """
        # Twice: nbytes was calibrated with the defaults, and slower settings need more time for them.
        measurement = self._timed(settings, 2 * self._share_s, on_bytes)
        on_bytes(self.nbytes - measurement.nbytes)  # a progress bar for all measurements must come to its end
        return measurement

    def _timed(self, settings: Settings, limit_s: float, on_bytes: Callable[[int], object]) -> Measurement:
        # The settings of a pool are fixed, so each measurement has a pool of its own.
        memory_before, others = tree_memory_bytes(os.getpid()), set(process_tree(os.getpid()))
        with RangeFetcher(self._s3client_config, PoolConfig(**asdict(settings))) as fetcher:
            _warm_up(fetcher, self._objects[0], settings)
            # After the warm-up, so that all workers are there, and none of its requests is counted.
            pids, stats = set(process_tree(os.getpid())) - others, fetcher.stats
            cpu_s, started = _cpu_seconds(pids), time.monotonic()
            nbytes = self._read(fetcher, started + limit_s, on_bytes)
            seconds = time.monotonic() - started
            # Before the fetcher is closed: the processor time of processes that have ended is not found any more.
            cpu_s, done = _cpu_seconds(pids) - cpu_s, fetcher.stats
            # Sampled once, at the end: the pool keeps its segments until it is closed, so this is the most it took.
            memory = tree_memory_bytes(os.getpid()) - memory_before
        requests, retries = done.requests - stats.requests, done.retries - stats.retries
        return Measurement(nbytes, seconds, cpu_s, requests, retries, max(0, memory))

    def _read(self, fetcher: RangeFetcher, deadline: float, on_bytes: Callable[[int], object]) -> int:
        """Read until all bytes have come or the deadline is over; returns the number of bytes that have come."""
        taken = 0
        for ranges in passes(self._objects, self.nbytes, fetcher.part_size):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                stream = fetcher.stream_many(ranges, order="completion", max_gap_size=0, timeout_s=left_s)
                for _, _, view in stream:
                    taken += len(view)
                    on_bytes(len(view))
                    del view  # else its slot would stay occupied while the next view is waited for
            except PoolTimeout:
                if time.monotonic() < deadline:
                    raise  # the time of a part was over, not that of the measurement
        return taken


def _warm_up(fetcher: RangeFetcher, item: SourceObject, settings: Settings) -> None:
    """Read a little for each connection, until every worker has received something."""
    # Ranges spread evenly over the object: two for each worker, or one for each connection if that is more.
    stride = max(2, item.nbytes // max(2 * settings.workers, settings.connections))
    width = min(_WARM_UP_BYTES, stride // 2)  # ranges that touch would be fetched as one
    ranges = [(start, start + width) for start in range(0, item.nbytes - width + 1, stride)]
    deadline = time.monotonic() + _WARM_UP_TIMEOUT_S
    while True:
        for _ in fetcher.stream(item.source, ranges, order="completion", max_gap_size=0):
            pass
        answered = sum(worker.requests > 0 for worker in fetcher.stats.workers)
        # A small object has fewer ranges than there are workers. The deadline is for workers that never get a range:
        # the pool gives parts to the connections that are warm already.
        if answered >= min(settings.workers, len(ranges)) or time.monotonic() > deadline:
            return


def _cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time so far, of this process and of these."""
    stats = [stat_fields(pid) for pid in pids]
    # User and system time in clock ticks. Those of this process are finer from process_time().
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats if fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
