"""Cost of a part for the main process: dispatch, completion and lease, with workers that answer at once.

The workers are real processes on real sockets, but receive nothing: what remains is the coordinator's and the
consumer's own work.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from mpreader import PoolConfig
from mpreader.pool.coordinator import process
from mpreader.pool.pool import Pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part

__all__ = ["print_coordinator_cost"]

PART_BYTES = 8 * 1024 * 1024
PARTS = 2000


class NothingToRead:
    """A source whose bytes are never received."""

    bucket = key = uri = "nothing"
    max_attempts = 1
    version = None

    def open(self) -> ObjectVersion:
        return ObjectVersion(PARTS * PART_BYTES, '"etag"')

    def route(self) -> Route:
        return Route(tls=False, host="localhost", port=80, target="/")


def measure(workers: int, connections: int) -> tuple[float, float]:
    """Seconds of processor time and of wall time that a part takes in the main process."""
    with_pool = PoolConfig(workers=workers, connections_per_worker=connections, max_memory=4 << 30)
    pool = Pool(with_pool)
    source = NothingToRead()
    slot_reads = [SlotRead(0, PART_BYTES, (Part(n * PART_BYTES, (n + 1) * PART_BYTES),)) for n in range(PARTS)]
    results = []
    try:
        for _ in range(2):  # the first one starts the workers and reserves the memory
            wall, cpu = time.perf_counter(), time.process_time()
            transfer = pool.read([source], slot_reads)
            for number in range(PARTS):
                transfer.take(number)
            transfer.close()
            results.append((time.process_time() - cpu, time.perf_counter() - wall))
    finally:
        pool.close()
    return results[-1][0] / PARTS, results[-1][1] / PARTS


def print_coordinator_cost() -> None:
    """Measure it for some pools, print a table."""
    here = str(Path(__file__).resolve().parent)
    process._START = (  # type: ignore[misc]
        "import sys; sys.path.pop(0); sys.path[:0] = [" + repr(here) + ", {root!r}]; "
        "from answering import answer_at_once; answer_at_once({arguments})"
    )
    print("processor time of the main process per part of 8 MiB, with workers that answer at once:")
    for workers, connections in ((2, 2), (2, 16), (8, 16)):
        cpu = sorted(measure(workers, connections) for _ in range(5))
        each = statistics.median(seconds for seconds, _ in cpu)
        print(f"  {workers} workers x {connections:2} connections: {each * 1e6:5.0f} us; 25 GB/s would take "
              f"{each * 25e9 / PART_BYTES:.2f} of a core")  # fmt: skip
