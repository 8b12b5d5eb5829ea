"""Sampler of the memory of a process tree: ``sampler.py PID``, run by memory.py.

It reads the ranges of the targets, which are not counted, as a line of JSON. It prints the bytes that there are at the
start, samples until it gets a second line, and then prints ``[[seconds, bytes], …]``.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from tree import resident_bytes, tree_memory_bytes

INTERVAL_S = 0.01  # between two samples, not counting the time that a sample takes


def _sample(pid: int, ranges: list[tuple[int, int]]) -> list[tuple[float, int]]:
    # The sampler is a child of the process that it samples, and leaves itself out.
    def taken() -> int:
        return tree_memory_bytes(pid, os.getpid()) - resident_bytes(pid, ranges)

    started = time.monotonic()
    print(taken(), flush=True)
    samples = []
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        samples.append((round(time.monotonic() - started, 3), taken()))
    # What there is at the end may be the peak, and a peak is what two samples have reached.
    return samples + [(round(time.monotonic() - started, 3), taken()) for _ in range(2)]


if __name__ == "__main__":
    print(json.dumps(_sample(int(sys.argv[1]), json.loads(sys.stdin.readline()))))
