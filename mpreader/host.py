"""Host facts: the cores, memory, shared memory and sharers that this process has, cgroup limits included."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Cgroup", "Host"]

_NO_LIMIT: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The limits of the control groups that this process is in: the tightest of its own and of those above.

    Attributes:
        version: 2, or 1; 0 where there are none.
        cores: CPU quota; None: no limit.
        memory_bytes: Memory limit; None: no limit.
        free_memory: Bytes that may still be allocated under it; page cache that can be dropped counts as free.
    """

    version: int = 0
    cores: float | None = None
    memory_bytes: int | None = None
    free_memory: int | None = None

    @classmethod
    def of(cls, root: Path) -> Cgroup:
        """Read them.

        Args:
            root: Folder that has ``proc`` and ``sys`` in it, such as ``/``.
        """
        quotas, limits = [], []
        for folder, is_v2 in _folders(root, "cpu"):
            with contextlib.suppress(OSError, ValueError):
                quotas.append(_quota(folder, is_v2=is_v2))
        for folder, is_v2 in _folders(root, "memory"):
            with contextlib.suppress(OSError, ValueError):
                limits.append(_memory_limit(folder, is_v2=is_v2))
        number = max((2 if is_v2 else 1 for _, is_v2 in _folders(root, "memory")), default=0)
        return cls(
            version=number,
            cores=min(quotas, default=None),
            memory_bytes=min((limit for limit, _ in limits), default=None),
            free_memory=min((free for _, free in limits), default=None),
        )


@dataclass(frozen=True, slots=True)
class Host:
    """What this process may use of the host.

    Attributes:
        cores: Cores that the process may run on.
        free_memory: Bytes that may still be allocated, under the cgroup's limit.
        free_shm: Bytes free in ``/dev/shm``.
        sharers: Processes that load at the same time on this host, this one included (``LOCAL_WORLD_SIZE``).
    """

    cores: int
    free_memory: int
    free_shm: int
    sharers: int = 1

    @classmethod
    def now(cls) -> Host:
        """Measure it."""
        status = os.statvfs("/dev/shm")  # noqa: S108  # asked about, not written to
        limits = Cgroup.of(Path("/"))
        cores, free = len(os.sched_getaffinity(0)), _available_memory()
        return cls(
            cores=cores if limits.cores is None else min(cores, max(1, math.ceil(limits.cores))),
            free_memory=free if limits.free_memory is None else min(free, limits.free_memory),
            free_shm=status.f_bavail * status.f_frsize,
            sharers=_local_world_size(),
        )


def _folders(root: Path, controller: str) -> list[tuple[Path, bool]]:
    """The folders of a controller for this process and its groups above, and whether they are of version 2."""
    top, found = root / "sys/fs/cgroup", []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            is_v2 = number == "0"
            # Where the controllers are those of version 1, there may be a hierarchy of version 2 without any.
            if not (top / "cgroup.controllers").exists() if is_v2 else controller not in controllers.split(","):
                continue
            mount = top if is_v2 else top / controller
            # With a namespace of its own, or in a container, the path may lead nowhere; the mount is ours all the same.
            own = [] if ".." in path else [part for part in path.split("/") if part]
            found += [(mount.joinpath(*own[:depth]), is_v2) for depth in range(len(own), -1, -1)]
    return [(folder, is_v2) for folder, is_v2 in found if folder.is_dir()]


def _quota(folder: Path, *, is_v2: bool) -> float:
    """The CPU quota, in cores.

    Raises:
        OSError: The group has none.
        ValueError: The group has none.
    """
    if is_v2:
        quota, period = (folder / "cpu.max").read_text().split()
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    if int(quota) <= 0:
        raise ValueError("no quota")
    return int(quota) / int(period)


def _memory_limit(folder: Path, *, is_v2: bool) -> tuple[int, int]:
    """The memory limit, and what is free under it.

    Raises:
        OSError: The group has none.
        ValueError: The group has none.
    """
    limit_file, used_file, cache = (
        ("memory.max", "memory.current", "inactive_file")
        if is_v2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    limit = int((folder / limit_file).read_text())
    if limit >= _NO_LIMIT:  # how version 1 says that there is none
        raise ValueError("no limit")
    used = int((folder / used_file).read_text())
    for line in (folder / "memory.stat").read_text().splitlines():
        if line.startswith(cache + " "):
            used -= int(line.split()[1])
    return limit, max(0, limit - used)


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _local_world_size() -> int:
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdigit() else 1
