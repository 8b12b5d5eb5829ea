"""What is wrong with a host's set-up, and what mends it: what is found (``Surroundings``), and what it is worth.

What needs the network is in :mod:`mpreader.tools.doctor.access`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from mpreader.config import POOL_SETTINGS, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.host import Cgroup, Host
from mpreader.pool.sizing import PoolSizes, size_pool
from mpreader.tools.doctor.finding import Finding
from mpreader.version import __version__

__all__ = ["Surroundings", "examine_host"]

_GiB: Final = 1024 * MiB
_PLENTY: Final = 1 << 60
_PACKAGES: Final = {
    "torch": "checkpoints can't be loaded without it; ranges can be fetched",
    "isal": "CRC-32 is some eight times slower without it",
}
# Open at one time besides a pool's own: boto3's connections; and what an interpreter opens in passing.
_CLIENT_FILES: Final = 32
_SPARE_FILES: Final = 16
_KNOWN_VARIABLES: Final = [*(f"MPREADER_{name.upper()}" for name in POOL_SETTINGS), "MPREADER_PROGRESS"]
_CA_VARIABLES: Final = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What this process finds around it.

    Attributes:
        all_cores: Cores of the host, whoever may use them.
        memory_bytes: Memory of the host.
        host: What this process may use, as the pool's sizes are made from.
        cgroup: The limits of its control groups.
        shm_bytes: Size of ``/dev/shm``; 0: there is none.
        open_files: Descriptors that are open now.
        files: How many descriptors it may have open, and how many it may ask for.
        versions: Of packages; None: not installed.
        environment: The environment variables.
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

    @classmethod
    def now(cls) -> Surroundings:
        """Look around."""
        shm_bytes = 0
        with contextlib.suppress(OSError):
            status = os.statvfs("/dev/shm")  # noqa: S108  # asked about, not written to
            shm_bytes = status.f_blocks * status.f_frsize
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(
            all_cores=os.cpu_count() or 1,
            memory_bytes=memory,
            host=Host.now() if shm_bytes else Host(len(os.sched_getaffinity(0)), memory, 0),
            cgroup=Cgroup.of(Path("/")),
            shm_bytes=shm_bytes,
            open_files=len(os.listdir("/proc/self/fd")) - 1,
            files=resource.getrlimit(resource.RLIMIT_NOFILE),
            versions={name: _version(name) for name in ("boto3", *_PACKAGES)},
            environment=os.environ,
        )


def examine_host(around: Surroundings, s3client_config: S3ClientConfig, pool_config: PoolConfig) -> Iterator[Finding]:
    """Look at what needs no network."""
    yield from _packages(around.versions)
    yield from _variables(around.environment)
    yield from _certificates(around.environment)
    roomy = replace(around.host, free_memory=_PLENTY, free_shm=_PLENTY)
    try:
        wanted = size_pool(pool_config, s3client_config, roomy)
        asked_for = (pool_config.value("max_memory") or 0) * around.host.sharers
    except ConfigError as error:
        wrong = " ".join(f"MPREADER_{name.upper()}" for name in POOL_SETTINGS if _is_wrong(name))
        remedy = f"correct it, or: unset {wrong}"
        yield Finding("pool", "fail", "a setting is wrong", str(error), remedy)
        return
    yield _cores(around)
    window = wanted.window_bytes * around.host.sharers
    yield _memory(around, max(2 * window, asked_for), asked_for)
    yield _shared_memory(around, max(window * 10 // 8, asked_for), asked_for)
    try:
        sizes = size_pool(pool_config, s3client_config, around.host)
    except ConfigError as error:
        yield Finding("pool", "fail", "can't be made", str(error), "see memory and shared memory above")
        return
    yield _pool(around, sizes)
    yield _files(around, sizes)


# -- what it is worth


def _packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    yield Finding(
        "versions", "ok", f"mpreader {__version__}, Python {sys.version.split()[0]}, boto3 {versions['boto3']}"
    )
    for name, problem in _PACKAGES.items():
        number = versions[name]
        if number is None:
            remedy = f"{shlex.quote(sys.executable or 'python')} -m pip install {name}"
            yield Finding(name, "warn", "not installed", problem, remedy)
        else:
            yield Finding(name, "ok", number)


def _variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted(environment):
        if name.startswith("MPREADER_") and name not in _KNOWN_VARIABLES:
            near = get_close_matches(name, _KNOWN_VARIABLES, 1)
            remedy = f"unset {name}" + (f"; did you mean {near[0]}?" if near else "")
            yield Finding("settings", "warn", name, "no setting has this name: it does nothing", remedy)


def _is_wrong(setting: str) -> bool:
    try:
        PoolConfig().value(setting)
    except ConfigError:
        return True
    return False


def _certificates(environment: Mapping[str, str]) -> Iterator[Finding]:
    given = {name: environment[name] for name in _CA_VARIABLES if environment.get(name)}
    for name, path in given.items():
        problem = _try_certificates(path)
        if problem is not None:
            remedy = f"unset {name}, or: export {name}=/path/to/authorities.pem"
            yield Finding("certificates", "fail", f"{name}={path}", problem, remedy)
        else:
            yield Finding("certificates", "ok", f"those of {name}={path}")
    if not given:
        yield Finding("certificates", "ok", "the usual ones")
    if environment.get("AWS_CA_BUNDLE") == "":
        yield Finding(
            "certificates", "warn", "AWS_CA_BUNDLE=", "newer boto3 refuses an empty one", "unset AWS_CA_BUNDLE"
        )


def _cores(around: Surroundings) -> Finding:
    cores, quota, sharers = around.host.cores, around.cgroup.cores, around.host.sharers
    value = f"{cores} of {around.all_cores} usable, CPU quota " + ("none" if quota is None else f"{quota:g}")
    value += f", shared by {sharers} ranks" if sharers > 1 else ""
    if cores < 2 <= around.all_cores:
        problem = "receiving and decoding take turns on one core"
        free = f"taskset -c 0-{around.all_cores - 1} python …"
        remedy = f"docker run --cpus=4 …, srun --cpus-per-task=4 …, or where there is no limit: {free}"
        return Finding("cores", "warn", value, problem, remedy)
    return Finding("cores", "ok", value)


def _memory(around: Surroundings, wanted: int, asked_for: int) -> Finding:
    free, cgroup = around.host.free_memory, around.cgroup
    limit = "none" if cgroup.memory_bytes is None else _size(cgroup.memory_bytes)
    kind = f" (cgroup v{cgroup.version})" if cgroup.version else ""
    value = f"{_size(free)} free of {_size(around.memory_bytes)}, limit {limit}{kind}"
    if free < wanted:
        remedy = "end what takes the memory: ps aux --sort=-rss | head"
        if cgroup.memory_bytes is not None:
            remedy = f"docker run --memory={_gib(cgroup.memory_bytes - free + wanted)}g …, or {remedy}"
        return _shortage("memory", value, around, wanted, asked_for, free // 2, remedy)
    return Finding("memory", "ok", value)


def _shared_memory(around: Surroundings, wanted: int, asked_for: int) -> Finding:
    free, size = around.host.free_shm, around.shm_bytes
    value = f"{_size(free)} free of {_size(size)} in /dev/shm"
    larger = f"docker run --shm-size={_gib(wanted)}g …, or: sudo mount -o remount,size={_gib(wanted)}g /dev/shm"
    if not size:
        remedy = "sudo mkdir -p /dev/shm && sudo mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
        return Finding("shared memory", "fail", "no /dev/shm", "there is nothing to receive into", remedy)
    if free >= wanted:
        return Finding("shared memory", "ok", value)
    remedy = f"remove what is stale: ls -lS /dev/shm; or: {larger}" if size >= wanted else larger
    return _shortage("shared memory", value, around, wanted, asked_for, free * 8 // 10, remedy)


def _shortage(
    name: str, value: str, around: Surroundings, wanted: int, asked_for: int, spare: int, remedy: str
) -> Finding:
    if asked_for == wanted:
        problem = f"{_size(asked_for)} are asked for (max_memory): a load that needs them fails"
        remedy = f"export MPREADER_MAX_MEMORY={max(1, spare // around.host.sharers // MiB)}MiB; or: {remedy}"
    else:
        problem = f"the pool wants {_size(wanted)}: with less, fewer connections are busy, with smaller requests"
    return Finding(name, "warn", value, problem, remedy)


def _pool(around: Surroundings, sizes: PoolSizes) -> Finding:
    ranks = f", for each of {around.host.sharers} ranks" if around.host.sharers > 1 else ""
    workers = "1 worker" if sizes.workers == 1 else f"{sizes.workers} workers"
    return Finding(
        "pool",
        "ok",
        f"{workers} with up to {sizes.connections_per_worker} connections, requests of {_size(sizes.part_bytes)}, "
        f"{_size(sizes.window_bytes)} read ahead, at most {_size(sizes.max_bytes)} of shared memory{ranks}",
    )


def _files(around: Surroundings, sizes: PoolSizes) -> Finding:
    soft, hard = (_PLENTY if limit == resource.RLIM_INFINITY else limit for limit in around.files)
    needed = files_needed(sizes, around.open_files)
    value = f"{'any number' if soft == _PLENTY else soft} allowed, {needed} needed"
    if soft >= needed:
        return Finding("descriptors", "ok", value)
    # Half as many again, since the program has files of its own.
    ask = 1 << (needed * 3 // 2).bit_length()
    if hard >= needed:
        remedy = f"ulimit -n {min(ask, hard)}"
    else:
        remedy = f"docker run --ulimit nofile={ask} …, LimitNOFILE={ask} of the service, or /etc/security/limits.conf"
    return Finding("descriptors", "fail", value, "workers and connections fail for want of descriptors", remedy)


def files_needed(sizes: PoolSizes, open_files: int) -> int:
    """Descriptors that the main process, or a worker if it needs more, may have open at one time.

    Args:
        sizes: Those of the pool.
        open_files: What the main process has open without it.
    """
    segments = -(-sizes.window_bytes // sizes.segment_bytes)
    # Of a worker: socket, pidfd, stderr. Of a segment: itself and its mapping. Besides: epoll and wake-up.
    main = open_files + 3 * sizes.workers + 2 * segments + _CLIENT_FILES
    # Of a connection: itself and its thread's statistics.
    worker = 2 * sizes.connections_per_worker + segments
    return max(main, worker) + _SPARE_FILES


# -- what there is


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _try_certificates(path: str) -> str | None:
    """What is wrong with a file, or folder, of certificate authorities."""
    if not os.path.exists(path):
        return "there is no such file"
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(**({"capath": path} if os.path.isdir(path) else {"cafile": path}))
    except OSError as error:  # SSLError is one
        return f"it can't be read as PEM certificates: {error.strerror or error}"
    return None


def _size(nbytes: int) -> str:
    return f"{nbytes / MiB:,.0f} MiB" if nbytes < 10 * _GiB else f"{nbytes / _GiB:,.0f} GiB"


def _gib(nbytes: int) -> int:
    return max(1, -(-nbytes // _GiB))
