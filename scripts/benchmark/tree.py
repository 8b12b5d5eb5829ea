"""CPU time and memory of a process tree, from ``/proc``.

Memory is counted exactly, page by page, which takes longer than the estimate of :mod:`mpreader.tools.bench.memory`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpreader.tools.bench.memory import process_tree, stat_fields

__all__ = ["Taken", "memory_of", "resident_bytes", "tree_cpu_s", "tree_memory_bytes"]

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PRESENT: Final = np.uint64(1 << 63)  # bit of a page's entry in pagemap: the page is in memory


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process, its live descendants, and all of them that have been waited for."""
    # User and system time, each also of the children that the process has waited for.
    return sum(sum(map(int, stat_fields(pid)[11:15])) for pid in process_tree(root)) * _TICK_S


def tree_memory_bytes(root: int, excluded: int) -> int:
    """Resident bytes of a process and its descendants, without the process ``excluded``.

    Each page of shared memory counts once, by however many processes it was touched. Pages of files count for each
    process.
    """
    return sum(memory_of(process_tree(root, {excluded})))


class Taken(NamedTuple):
    """Resident bytes of processes: their own, and those of the memory that they share, each page of it once."""

    own: int
    shared: int


def memory_of(pids: Iterable[int]) -> Taken:
    """Resident bytes of processes."""
    # By the identity of a piece of shared memory: the pages of it that any of the processes has touched.
    own, shared = 0, dict[str, NDArray[np.bool_]]()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            own += _own_bytes(pid)
            for inode, first, pages in _shared_pages(pid):
                shared[inode] = _merged(shared.get(inode), first, pages)
    return Taken(own, sum(int(np.count_nonzero(pages)) for pages in shared.values()) * mmap.PAGESIZE)


def _merged(known: NDArray[np.bool_] | None, first: int, pages: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pages that are in ``known`` or in ``pages``, of which the first one has the number ``first``."""
    before = 0 if known is None else len(known)
    merged = np.zeros(max(before, first + len(pages)), np.bool_)
    if known is not None:
        merged[:before] = known
    merged[first : first + len(pages)] |= pages
    return merged


def resident_bytes(pid: int | str, ranges: Sequence[tuple[int, int]]) -> int:
    """Bytes of the ``(address, size)`` ranges that have memory behind them."""
    return sum(int(np.count_nonzero(pages)) for pages in _present(pid, ranges)) * mmap.PAGESIZE


def _own_bytes(pid: int) -> int:
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(words[1]) * 1024 for words in fields if words[0] in ("RssAnon:", "RssFile:"))


def _shared_pages(pid: int) -> Iterator[tuple[str, int, NDArray[np.bool_]]]:
    """For each mapping of shared memory: identity of the memory, number of the first page, and the pages present."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, permissions, offset, device, inode, *path = line.split(maxsplit=5)
        if permissions.endswith("s") and path and path[0].startswith(("/dev/shm", "/dev/zero", "/memfd:")):
            start, end = (int(address, 16) for address in addresses.split("-"))
            for pages in _present(pid, [(start, end - start)]):
                yield f"{device} {inode}", int(offset, 16) // mmap.PAGESIZE, pages


def _present(pid: int | str, ranges: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.bool_]]:
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for address, size in ranges:
            first, end = address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)
            pagemap.seek(8 * first)  # eight bytes for each page of the address space
            yield (np.frombuffer(pagemap.read(8 * (end - first)), np.uint64) & _PRESENT) != 0
