"""CPU time and memory of a process tree, from ``/proc``."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["resident_bytes", "tree_cpu_s", "tree_memory_bytes"]

_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")
_PRESENT: Final = np.uint64(1 << 63)


def tree_cpu_s(root: int) -> float:
    """CPU seconds of a process, its live descendants, and all of them that have been waited for."""
    return sum(sum(map(int, fields[11:15])) for _, fields in _tree(root)) * _TICK_S


def tree_memory_bytes(root: int, excluded: int) -> int:
    """Resident bytes of a process and its descendants without ``excluded``.

    Shared memory counts once, however many have it mapped, and also where each has touched only some of it. Pages of
    files count for each process.
    """
    own, shared = 0, dict[str, NDArray[np.bool_]]()
    for pid in [pid for pid, _ in _tree(root) if pid != excluded]:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            own += _own_bytes(pid)
            for inode, first, pages in _shared_pages(pid):
                shared[inode] = _merged(shared.get(inode), first, pages)
    return own + sum(int(np.count_nonzero(pages)) for pages in shared.values()) * mmap.PAGESIZE


def _merged(known: NDArray[np.bool_] | None, first: int, pages: NDArray[np.bool_]) -> NDArray[np.bool_]:
    before = 0 if known is None else len(known)
    merged = np.zeros(max(before, first + len(pages)), np.bool_)
    if known is not None:
        merged[:before] = known
    merged[first : first + len(pages)] |= pages
    return merged


def resident_bytes(pid: int | str, ranges: Sequence[tuple[int, int]]) -> int:
    """Bytes of the ``(address, size)`` ranges that have memory behind them."""
    return sum(int(np.count_nonzero(pages)) for pages in _present(pid, ranges)) * mmap.PAGESIZE


def _tree(root: int) -> Iterator[tuple[int, list[str]]]:
    """Process ids, and the fields of ``stat`` from the state on."""
    stats: dict[int, list[str]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stats[int(entry)] = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
    for pid, fields in stats.items():
        ancestor = pid
        while ancestor in stats and ancestor != root:
            ancestor = int(stats[ancestor][1])
        if ancestor == root:
            yield pid, fields


def _own_bytes(pid: int) -> int:
    fields = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(words[1]) * 1024 for words in fields if words[0] in ("RssAnon:", "RssFile:"))


def _shared_pages(pid: int) -> Iterator[tuple[str, int, NDArray[np.bool_]]]:
    """For each mapping of shared memory: what is mapped, its first page there, and which pages are present."""
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
            pagemap.seek(8 * first)
            yield (np.frombuffer(pagemap.read(8 * (end - first)), np.uint64) & _PRESENT) != 0
