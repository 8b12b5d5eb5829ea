"""What is wrong with a host's set-up, and what mends it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Literal

from mpreader.config import POOL_SETTINGS, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.pool.sizing import Host, PoolSizes, size_pool

__all__ = ["Finding", "Surroundings", "examine", "examine_host"]

Status = Literal["ok", "warn", "fail"]

_GiB: Final = 1024 * MiB
_SMALL_SHM: Final = 256 * MiB
_SMALL_MEMORY: Final = 1 * _GiB
# Of each worker besides its connections, and of the main process: pipes, files of shared memory, boto3's connections.
_OWN_FILES: Final = 64
_FILES_PER_WORKER: Final = 8
_PACKAGES: Final = ("torch", "boto3", "isal")
_OTHER_VARIABLES: Final = ("MPREADER_PROGRESS",)
_CA_VARIABLES: Final = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``"ok"``; ``"warn"``: it works, but worse than it could; ``"fail"``: it does not.
        value: What was found.
        problem: What is wrong with it; "" if nothing is.
        remedy: The command, or the setting, that mends it; "" if nothing is wrong.
    """

    name: str
    status: Status
    value: str
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What this process finds around it.

    Attributes:
        platform: As ``sys.platform`` says.
        all_cores: Cores of the host, whoever may use them.
        host: What this process may use.
        shm_bytes: Size of ``/dev/shm``.
        files: How many descriptors it may have open, and how many it may ask for.
        versions: Of packages; None: not installed.
        environment: The environment variables.
    """

    platform: str
    all_cores: int
    host: Host
    shm_bytes: int
    files: tuple[int, int]
    versions: Mapping[str, str | None]
    environment: Mapping[str, str]

    @classmethod
    def now(cls) -> Surroundings:
        """Look around."""
        status = os.statvfs("/dev/shm")  # noqa: S108  # asked about, not written to
        return cls(
            platform=sys.platform,
            all_cores=os.cpu_count() or 1,
            host=Host.now(),
            shm_bytes=status.f_blocks * status.f_frsize,
            files=resource.getrlimit(resource.RLIMIT_NOFILE),
            versions={name: _version(name) for name in _PACKAGES},
            environment=os.environ,
        )


def examine(
    source: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> list[Finding]:
    """Look at the host, the settings, the credentials and the way to S3. Takes some seconds at most.

    Args:
        source: ``s3://bucket`` or ``s3://bucket/prefix`` that is to be read. None: only the service is asked.
        s3client_config: How S3 is reached.
        pool_config: Settings of the worker pool.

    Raises:
        ConfigError: ``source`` is no ``s3://`` URI.
    """
    from mpreader.access import examine_access

    s3client_config = s3client_config or S3ClientConfig()
    findings = examine_host(Surroundings.now(), s3client_config, pool_config or PoolConfig())
    return [*findings, *examine_access(source, s3client_config)]


def examine_host(
    surroundings: Surroundings, s3client_config: S3ClientConfig, pool_config: PoolConfig
) -> Iterator[Finding]:
    """Look at what needs no network."""
    host = surroundings.host
    if surroundings.platform != "linux":
        yield Finding("system", "fail", surroundings.platform, "mpreader runs on Linux only", "use a Linux host")
    yield from _packages(surroundings.versions)
    yield _cores(surroundings)
    yield _memory(host)
    yield _shared_memory(surroundings)
    yield from _variables(surroundings.environment)
    try:
        sizes = size_pool(pool_config, s3client_config, host)
    except ConfigError as error:
        yield Finding("pool", "fail", "can't be made", str(error), "give it more memory, or correct the setting")
        return
    yield _pool(sizes)
    yield _files(surroundings.files, sizes)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    from mpreader import __version__

    found = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    value = f"mpreader {__version__}, Python {sys.version.split()[0]}, {found}"
    missing = [name for name in ("torch", "isal") if not versions.get(name)]
    if missing:
        problem = f"checkpoints can't be loaded without {' and '.join(missing)}; ranges can be fetched"
        yield Finding("versions", "warn", value, problem, "pip install 'mpreader[dcp]'")
    else:
        yield Finding("versions", "ok", value)


def _cores(surroundings: Surroundings) -> Finding:
    cores, sharers = surroundings.host.cores, surroundings.host.sharers
    value = f"{cores} of {surroundings.all_cores}" + (f", shared by {sharers} ranks" if sharers > 1 else "")
    if cores < 2:
        return Finding(
            "cores",
            "warn",
            value,
            "receiving and decoding take turns on one core",
            "give the process more: docker run --cpus=4 …, taskset, or the job's CPU request",
        )
    return Finding("cores", "ok", value)


def _memory(host: Host) -> Finding:
    value = f"{_mib(host.free_memory)} free under the memory limit"
    if host.free_memory < _SMALL_MEMORY:
        problem = "that is little besides the tensors of a checkpoint"
        return Finding("memory", "warn", value, problem, "raise the limit: docker run --memory=…, or the job's request")
    return Finding("memory", "ok", value)


def _shared_memory(surroundings: Surroundings) -> Finding:
    free = surroundings.host.free_shm
    value = f"{_mib(free)} of {_mib(surroundings.shm_bytes)} free in /dev/shm"
    if free >= _SMALL_SHM:
        return Finding("shared memory", "ok", value)
    if surroundings.shm_bytes >= _SMALL_SHM:
        problem, remedy = "other programs fill it, so that less is read ahead", "ls -lS /dev/shm; remove what is stale"
    else:
        problem, remedy = "it is small, so that less is read ahead", "docker run --shm-size=1g …"
    remedy += "; or: mount -o remount,size=1g /dev/shm"
    return Finding("shared memory", "warn", value, problem, remedy)


def _variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    known = [f"MPREADER_{name.upper()}" for name in POOL_SETTINGS] + [*_OTHER_VARIABLES]
    for name in sorted(environment):
        if name.startswith("MPREADER_") and name not in known:
            near = get_close_matches(name, known, 1)
            remedy = f"unset {name}" + (f"; did you mean {near[0]}?" if near else "")
            yield Finding("settings", "warn", name, "no setting has this name: it does nothing", remedy)
    for name in _CA_VARIABLES:
        path = environment.get(name)
        if path and not os.path.exists(path):
            yield Finding("certificates", "fail", f"{name}={path}", "there is no such file", f"unset {name}")


def _pool(sizes: PoolSizes) -> Finding:
    return Finding(
        "pool",
        "ok",
        f"{sizes.workers} workers with up to {sizes.connections_per_worker} connections, parts of "
        f"{_mib(sizes.part_bytes)}, at most {_mib(sizes.max_bytes)} of shared memory, {_mib(sizes.window_bytes)} of it "
        "to read ahead",
    )


def _files(limits: tuple[int, int], sizes: PoolSizes) -> Finding:
    soft, hard = (sys.maxsize if limit == resource.RLIM_INFINITY else limit for limit in limits)
    segments = -(-sizes.window_bytes // sizes.segment_bytes)
    needed = _OWN_FILES + max(sizes.connections_per_worker + segments, _FILES_PER_WORKER * sizes.workers + segments)
    value = f"{'any number of' if soft == sys.maxsize else soft} descriptors, some {needed} are needed"
    if soft >= needed:
        return Finding("files", "ok", value)
    remedy = f"ulimit -n {needed}" if hard >= needed else f"docker run --ulimit nofile={needed} …, or limits.conf"
    return Finding("files", "fail", value, "workers would fail for want of descriptors", remedy)


def _mib(nbytes: int) -> str:
    if nbytes >= 1 << 60:
        return "any amount"
    return f"{nbytes / MiB:,.0f} MiB" if nbytes < 10 * _GiB else f"{nbytes / _GiB:,.0f} GiB"
