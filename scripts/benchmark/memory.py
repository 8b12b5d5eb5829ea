"""Memory of the measured process and its descendants over time, sampled by a process of its own (sampler.py).

Unlike :mod:`mpreader.tools.bench.memory` it leaves out the targets, and counts shared memory page by page.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Memory"]


class Memory:
    """Samples the memory while blocks run, as bytes beyond those before the first block.

    Memory that a first load has left, such as a pool's, therefore counts in the second load, too.

    Args:
        enabled: False: nothing is sampled.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._before: int | None = None

    @contextmanager
    def sampled(self, target_ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Sample while the block runs.

        Args:
            target_ranges: Addresses and sizes of memory that is not counted.

        Yields:
            Fields of a ``Run``, filled in when the block ends; empty if nothing is sampled.
        """
        result: dict[str, Any] = {}
        if not self._enabled:
            yield result
            return
        command = [sys.executable, str(Path(__file__).with_name("sampler.py")), str(os.getpid())]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert sampler.stdin is not None
        assert sampler.stdout is not None
        print(json.dumps(target_ranges), file=sampler.stdin, flush=True)
        # Also the sign that the sampler has started: the block must not run before.
        there = int(sampler.stdout.readline())
        before = self._before = there if self._before is None else self._before
        try:
            yield result
        finally:
            samples = json.loads(sampler.communicate("end\n")[0])
            extras = [(seconds, taken - before) for seconds, taken in samples]
            result |= {"samples": extras, "peak_extra_bytes": _peak([extra for _, extra in extras])}


def _peak(extras: list[int]) -> int:
    # Between fork and exec a child seems to have all the memory of its parent. That is seen in one sample at most, so a
    # peak is what two samples in a row have reached.
    return max(map(min, itertools.pairwise(extras)), default=0)
