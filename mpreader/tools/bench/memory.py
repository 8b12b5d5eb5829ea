"""Memory of a process tree over time, sampled while something else runs in it.

The samples are the kernel's counters (``Rss*`` of ``/proc/<pid>/status``), which cost the tree nothing; proportional
set sizes would be exact, but take seconds of a large process's time. ``python -m mpreader.tools.bench.memory`` is the
sampler: a process of its own, since a thread would compete for the interpreter's lock with what it measures. The demo,
``mpreader load``, ``mpreader bench`` and ``scripts/bench`` use this module; it knows nothing of pools or loads.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TreeMemory", "process_tree", "stat_fields", "tree_memory_bytes"]

SAMPLE_INTERVAL_S = 0.05  # a shorter peak may be missed; each sample reads the whole process table


class TreeMemory:
    """Samples the memory of this process and its descendants while it is entered.

    Args:
        excluded_pids: Processes that are not counted, nor are their descendants, such as servers.

    Attributes:
        samples: After the ``with`` block: ``(seconds, bytes)`` since it was entered, bytes counted from that moment.
    """

    def __init__(self, excluded_pids: Iterable[int] = ()) -> None:
        self._excluded = list(excluded_pids)
        self.samples: list[tuple[float, int]] = []

    @property
    def peak_extra_bytes(self) -> int:
        """Most bytes that were added at one time."""
        return max((extra for _, extra in self.samples), default=0)

    def __enter__(self) -> Self:
        from mpreader.pool.coordinator.interpreter import find_interpreter  # the sampler itself does not need it

        command = [find_interpreter(), "-m", "mpreader.tools.bench.memory", str(os.getpid()), *map(str, self._excluded)]
        self._sampler = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        # The sampler says "ready" when it has taken the value that all samples are compared with: what the block
        # allocates must come after that.
        if self._sampler.stdout is None or self._sampler.stdout.readline() != "ready\n":
            raise RuntimeError("the memory sampler did not start")
        return self

    def __exit__(self, *_: object) -> None:
        output = self._sampler.communicate()[0]  # closes its standard input, which ends it
        self.samples = [(seconds, extra) for seconds, extra in json.loads(output)]


def tree_memory_bytes(root: int, excluded_pids: Iterable[int] = ()) -> int:
    """Memory of a process and its descendants now, in bytes.

    Shared memory counts once: as much as the process that has touched most of it. Pages of files, which processes
    share too, count for each of them, so the number is rather too large than too small.
    """
    processes = [_resident_bytes(pid) for pid in process_tree(root, set(excluded_pids))]
    own = sum(counters.get("RssAnon", 0) + counters.get("RssFile", 0) for counters in processes)
    # Not the sum: a page of shared memory is resident in each process that has touched it.
    return own + max((counters.get("RssShmem", 0) for counters in processes), default=0)


def process_tree(root: int, excluded: Container[int] = ()) -> Iterator[int]:
    """Numbers of a process and its descendants, without those that are ``excluded``, and without their descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = stat_fields(int(entry)) if entry.isdigit() else []
        if fields:
            # The second field is the parent: /proc leads from a child to its parent only.
            children.setdefault(int(fields[1]), []).append(int(entry))
    todo = [root]
    while todo:
        pid = todo.pop()
        if pid not in excluded:
            yield pid
            todo.extend(children.get(pid, ()))


def stat_fields(pid: int) -> list[str]:
    """Fields of a process's ``/proc/<pid>/stat`` from its state on; none if it has ended."""
    try:
        # The name before them is in parentheses, and may hold anything, spaces and parentheses too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _resident_bytes(pid: int) -> dict[str, int]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended meanwhile
        return {}
    fields = (line.split() for line in status.splitlines() if line.startswith("Rss"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in fields}


def _sample(root: int, excluded: set[int]) -> list[tuple[float, int]]:
    """Sample until the standard input ends, as it does at the end of the block of :class:`TreeMemory`."""
    started, before = time.monotonic(), tree_memory_bytes(root, excluded)
    print("ready", flush=True)
    samples = []
    while not select.select([sys.stdin], [], [], SAMPLE_INTERVAL_S)[0]:  # readable: its writing end was closed
        samples.append((round(time.monotonic() - started, 3), tree_memory_bytes(root, excluded) - before))
    return samples


if __name__ == "__main__":
    pids = [int(argument) for argument in sys.argv[1:]]
    # The sampler is a child of what it measures: it leaves itself out.
    samples = json.dumps(_sample(pids[0], {*pids[1:], os.getpid()}))
    try:
        print(samples, flush=True)
    except BrokenPipeError:  # what was measured was killed: nobody is left to be told, nor to read a traceback
        os._exit(1)
