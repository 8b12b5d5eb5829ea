"""Cost of a part for the main process: dispatch, completion and lease, with workers that answer at once.

The workers are real processes on real sockets, but receive nothing: the processor time that is left is the work of the
coordinator and the consumer.
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
    """Source whose bytes are never received; it has the attributes and methods that a pool uses of a source."""

    bucket = key = uri = "nothing"
    max_attempts = 1
    version = None

    def open(self) -> ObjectVersion:
        return ObjectVersion(PARTS * PART_BYTES, '"etag"')

    def route(self) -> Route:
        return Route(tls=False, host="localhost", port=80, target="/")


def measure(workers: int, connections: int) -> float:
    """Seconds of processor time that a part takes in the main process."""
    # 4 GiB are more than any of these pools reads ahead, so that none is bounded by memory.
    pool = Pool(PoolConfig(workers=workers, connections_per_worker=connections, max_memory=4 << 30))
    source = NothingToRead()
    slot_reads = [SlotRead(0, PART_BYTES, (Part(n * PART_BYTES, (n + 1) * PART_BYTES),)) for n in range(PARTS)]
    try:
        for _ in range(2):  # the first read starts the workers and reserves the memory; only the second one counts
            started = time.process_time()
            transfer = pool.read([source], slot_reads)
            for number in range(PARTS):
                transfer.take(number)
            transfer.close()
            seconds = time.process_time() - started
    finally:
        pool.close()
    return seconds / PARTS


def print_coordinator_cost() -> None:
    """Measure the cost for some pools, and print a table."""
    # A pool has no option for another kind of worker, so the code that starts them is replaced. This folder, and
    # mpreader's, come first on the path of the process, which then imports answering.py.
    here = str(Path(__file__).resolve().parent)
    process._START = (  # type: ignore[misc]
        "import sys; sys.path.pop(0); sys.path[:0] = [" + repr(here) + ", {root!r}]; "
        "from answering import answer_at_once; answer_at_once({arguments})"
    )
    print("processor time of the main process per part of 8 MiB, with workers that answer at once:")
    for workers, connections in ((2, 2), (2, 16), (8, 16)):
        each = statistics.median(measure(workers, connections) for _ in range(5))
        print(f"  {workers} workers x {connections:2} connections: {each * 1e6:5.0f} us; 25 GB/s would take "
              f"{each * 25e9 / PART_BYTES:.2f} of a core")  # fmt: skip
