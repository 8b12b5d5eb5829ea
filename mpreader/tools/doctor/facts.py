"""Host facts: everything about a host that the doctor judges without the network, gathered at one time.

:mod:`mpreader.tools.doctor.host` judges them. Nothing is judged here, so that a test can pass facts that it makes up.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from mpreader.host import Cgroup, Host
from mpreader.shared_memory import has_memfd, largest_file_bytes

__all__ = ["HostFacts"]

_PACKAGES: Final = ("boto3", "torch", "isal")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """State of this process's host.

    Attributes:
        all_cores: Cores of the host, whoever may use them.
        memory_bytes: Memory of the host.
        host: Cores and memory that this process may use; the sizes of a pool are derived from them.
        cgroup: Limits of the process's control groups.
        shm_bytes: Size of ``/dev/shm``; 0 if there is none.
        open_files: Descriptors that are open now.
        files: Soft and hard limit of open descriptors: the process may raise the soft one up to the hard one.
        versions: Versions of packages by name; None: not installed.
        environment: The environment variables.
        file_bytes: Limit of file sizes, which shared memory obeys, too; None: no limit.
        refused_calls: System calls that the kernel, or a filter of a container, refuses, and that are done without.
    """

    all_cores: int
    memory_bytes: int
    host: Host
    cgroup: Cgroup
    shm_bytes: int
    open_files: int
    files: tuple[int, int]
    versions: Mapping[str, str | None]
    environment: Mapping[str, str]
    file_bytes: int | None = None
    refused_calls: tuple[str, ...] = ()

    @classmethod
    def now(cls) -> HostFacts:
        """Gather the facts."""
        shm_bytes = 0
        with contextlib.suppress(OSError):
            status = os.statvfs("/dev/shm")  # noqa: S108  # only its size is read
            shm_bytes = status.f_blocks * status.f_frsize
        host = Host.now()
        return cls(
            all_cores=os.cpu_count() or 1,
            memory_bytes=max(host.free_memory, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
            host=host,
            cgroup=Cgroup.of(Path("/")),
            shm_bytes=shm_bytes,
            open_files=_open_files(),
            files=resource.getrlimit(resource.RLIMIT_NOFILE),
            versions={name: _version(name) for name in _PACKAGES},
            environment=os.environ,
            file_bytes=largest_file_bytes(),
            refused_calls=tuple(_refused_calls()),
        )


def _refused_calls() -> Iterator[str]:
    if not has_memfd():
        yield "memfd_create"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError):  # refused, or not known to this interpreter
        yield "pidfd_open"


def _open_files() -> int:
    with contextlib.suppress(OSError):  # no /proc
        return len(os.listdir("/proc/self/fd")) - 1  # listing the folder opens it
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
