"""Memory of the measured process and its descendants over time, sampled by a process of its own."""

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
    """Samples in blocks; all of them count from what there was before the first.

    Or what a first load has left, to be used again, would be nothing in the second.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._before: int | None = None

    @contextmanager
    def sampled(self, target_ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
        """Sample in the block, ``target_ranges`` not counted; the result is filled in at its end."""
        result: dict[str, Any] = {}
        if not self._enabled:
            yield result
            return
        command = [sys.executable, str(Path(__file__).with_name("sampler.py")), str(os.getpid())]
        sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert sampler.stdin is not None
        assert sampler.stdout is not None
        print(json.dumps(target_ranges), file=sampler.stdin, flush=True)
        there = int(sampler.stdout.readline())
        before = self._before = there if self._before is None else self._before
        try:
            yield result
        finally:
            samples = json.loads(sampler.communicate("end\n")[0])
            extras = [(seconds, taken - before) for seconds, taken in samples]
            result |= {"samples": extras, "peak_extra_bytes": _peak([extra for _, extra in extras])}


def _peak(extras: list[int]) -> int:
    # Between fork and exec a process seems to have all memory of its parent: one sample is no peak.
    return max(map(min, itertools.pairwise(extras)), default=0)
