"""Host facts: cores, memory, shared memory and number of ranks, under the limits of the process's control groups.

Reads them from ``/proc``, ``/sys`` and the environment. It must not decide anything by them:
:mod:`mpreader.pool.sizing` derives the pool's sizes from them, and the doctor judges them. A fact that the host refuses
to tell (``/proc`` is not mounted, a filter refuses the system call) is replaced by what is known, or by a low guess.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mpreader.ranks import local_ranks
from mpreader.shared_memory import free_shm, has_memfd

__all__ = ["Cgroup", "Host", "available_memory", "usable_cores"]

# Memory limits from this size on mean that there is none: version 1 of the control groups writes the largest multiple
# of a page below 2**63 bytes for it.
_NO_LIMIT: Final = 1 << 60
# Free memory of a host that tells nothing of its memory: ``max_memory`` can say more.
_UNTOLD_MEMORY_BYTES: Final = 512 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Limits of the control groups of this process: the smallest of its own group and of all groups above it.

    Attributes:
        version: Version of the control groups, 1 or 2; 0 where there are none.
        cores: CPU quota in cores, may be a fraction; None: no limit.
        memory_bytes: Memory limit in bytes; None: no limit.
        free_memory: Bytes that may still be allocated under the limits; page cache that the kernel can drop counts as
            free. None: no limit.
    """

    version: int = 0
    cores: float | None = None
    memory_bytes: int | None = None
    free_memory: int | None = None

    @classmethod
    def of(cls, root: Path) -> Cgroup:
        """Read the limits.

        Args:
            root: Folder that contains ``proc`` and ``sys``: ``/``, or one that a test has made.
        """
        quotas, limits = [], []
        # A group without a limit raises, and is left out.
        for folder, is_v2 in _groups(root, "cpu"):
            with contextlib.suppress(OSError, ValueError):
                quotas.append(_quota(folder, is_v2=is_v2))
        memory_groups = _groups(root, "memory")
        for folder, is_v2 in memory_groups:
            with contextlib.suppress(OSError, ValueError):
                limits.append(_memory_limit(folder, is_v2=is_v2))
        return cls(
            version=max((2 if is_v2 else 1 for _, is_v2 in memory_groups), default=0),
            cores=min(quotas, default=None),
            memory_bytes=min((limit for limit, _ in limits), default=None),
            # The least of all groups, not that of the group with the smallest limit: a group above with a larger limit
            # may be nearly full with other processes.
            free_memory=min((free for _, free in limits), default=None),
        )


@dataclass(frozen=True, slots=True)
class Host:
    """Resources of the host that this process may use, together with the other ranks of its job.

    Attributes:
        cores: Cores that the process may run on, by its affinity and its CPU quota, rounded up.
        free_memory: Bytes that may still be allocated, on the host and under the limits of the control groups.
        free_shm: Free bytes of ``/dev/shm``; None if shared memory is bounded by nothing but the free memory, since it
            is made by ``memfd_create``, or if the kernel does not tell.
        sharers: Number of processes that load at the same time on this host, this one included; see
            :mod:`mpreader.ranks`. The other attributes are not divided by it.
        cores_of_all: Cores that the ranks may run on together: more than ``cores`` where the launcher has bound each
            rank to cores of its own, which are not to be divided once more. 0: the same as ``cores``.
    """

    cores: int
    free_memory: int
    free_shm: int | None
    sharers: int = 1
    cores_of_all: int = 0

    @property
    def own_cores(self) -> int:
        """This process's share of the cores, at least 1."""
        return max(1, min(self.cores, max(self.cores, self.cores_of_all) // self.sharers))

    @classmethod
    def now(cls) -> Host:
        """Measure the host as it is now; never fails."""
        quota, cores, ranks = Cgroup.of(Path("/")).cores, usable_cores(), local_ranks().number
        most = cores if quota is None else max(1, math.ceil(quota))
        together = max(cores, _cores_of_launcher()) if ranks > 1 else cores
        return cls(
            cores=min(cores, most),
            free_memory=available_memory() or _UNTOLD_MEMORY_BYTES,
            free_shm=None if has_memfd() else free_shm(),
            sharers=ranks,
            cores_of_all=together if quota is None else min(together, most),
        )


def usable_cores() -> int:
    """Return the number of cores that this process may run on, without regard to a CPU quota."""
    try:
        return len(os.sched_getaffinity(0))
    except OSError:  # a filter refuses the call
        return os.cpu_count() or 1


def _cores_of_launcher() -> int:
    """Number of cores that the process which has started this one may run on; 0 if that is not told."""
    try:
        return len(os.sched_getaffinity(os.getppid()))
    except OSError:
        return 0


def available_memory() -> int | None:
    """Return the bytes that may be allocated now, on the host and under the process's control groups.

    Returns:
        The bytes; None if the host does not tell.
    """
    known = [_free_memory_of_host()]
    for folder, is_v2 in _own_memory_groups(os.getpid()):
        with contextlib.suppress(OSError, ValueError):  # a group without a limit
            known.append(_memory_limit(folder, is_v2=is_v2)[1])
    return min((free for free in known if free is not None), default=None)


@functools.lru_cache(maxsize=1)
def _own_memory_groups(_pid: int) -> list[tuple[Path, bool]]:
    # Kept: to find them takes longer than to ask them, and the arena asks for each segment.
    return _groups(Path("/"), "memory")


def _groups(root: Path, controller: str) -> list[tuple[Path, bool]]:
    """Find the folders of this process's control group and of all groups above it.

    Args:
        root: Folder that contains ``proc`` and ``sys``.
        controller: ``"cpu"`` or ``"memory"``. In version 1 each controller has a hierarchy of its own.

    Returns:
        The folders that exist, each with True if its group is of version 2.
    """
    top, found = root / "sys/fs/cgroup", []
    with contextlib.suppress(OSError):  # a kernel without control groups
        # A line for each hierarchy, such as "4:cpu,cpuacct:/job" (version 1) or "0::/job" (version 2).
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_v2 = number == "0"
            # A host that uses version 1 may have a hierarchy of version 2 besides, which has no controllers and limits
            # nothing.
            if not (top / "cgroup.controllers").exists() if is_v2 else controller not in controllers.split(","):
                continue
            mount = top if is_v2 else top / controller
            # In a container, or in a namespace of its own, the path may be that of the host, which does not exist here.
            # The mount itself (depth 0) is the container's group then, and has its limits.
            own = [] if ".." in path else [part for part in path.split("/") if part]
            found += [(mount.joinpath(*own[:depth]), is_v2) for depth in range(len(own), -1, -1)]
    return [(folder, is_v2) for folder, is_v2 in found if folder.is_dir()]


def _quota(folder: Path, *, is_v2: bool) -> float:
    """Return the CPU quota of a group, in cores.

    Raises:
        OSError: The group has no quota: there is no such file.
        ValueError: The group has no quota: the file contains "max", or -1.
    """
    if is_v2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) <= 0:
        raise ValueError("no quota")
    return int(quota) / int(period)


def _memory_limit(folder: Path, *, is_v2: bool) -> tuple[int, int]:
    """Return the memory limit of a group in bytes, and how many of these are free.

    Raises:
        OSError: The group has no limit: there is no such file.
        ValueError: The group has no limit: the file contains "max", or a number larger than any memory.
    """
    limit_file, used_file, cache = (
        ("memory.max", "memory.current", ("inactive_file", "active_file"))
        if is_v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
    )
    limit = int((folder / limit_file).read_text())
    if limit >= _NO_LIMIT:
        raise ValueError("no limit")
    # The usage includes page cache, which the kernel drops before it refuses an allocation: it counts as free. A host
    # that has read much would seem to be full otherwise. (Shared memory is not part of these numbers.)
    used = int((folder / used_file).read_text())
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, number = line.partition(" ")
        if name in cache:
            used -= int(number)
    return limit, max(0, limit - used)


def _free_memory_of_host() -> int | None:
    """Return the bytes that may be allocated on the host without swapping; None if it does not tell."""
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) * 1024
    # Kernels before 3.14 have no such line, and in a sandbox there may be no /proc. Without page cache this is less
    # than what could be allocated.
    with contextlib.suppress(OSError, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return free if free > 0 else None
    return None
