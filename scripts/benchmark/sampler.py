"""Samples the memory of a process tree, targets not counted: ``sampler.py PID`` until a second line comes.

The first line are the targets' ranges in JSON. Says how many bytes there are, and at the end ``[[seconds, bytes], …]``.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

from tree import resident_bytes, tree_memory_bytes

INTERVAL_S = 0.01


def _sample(pid: int, ranges: list[tuple[int, int]]) -> list[tuple[float, int]]:
    def taken() -> int:
        return tree_memory_bytes(pid, os.getpid()) - resident_bytes(pid, ranges)

    started = time.monotonic()
    print(taken(), flush=True)
    samples = []
    while not select.select([sys.stdin], [], [], INTERVAL_S)[0]:
        samples.append((round(time.monotonic() - started, 3), taken()))
    return samples


if __name__ == "__main__":
    print(json.dumps(_sample(int(sys.argv[1]), json.loads(sys.stdin.readline()))))
