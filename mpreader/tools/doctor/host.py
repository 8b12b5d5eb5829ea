"""Checks of a host's set-up: packages, settings, certificates, cores, memory, shared memory, descriptors.

They need no network; the checks that do are in :mod:`mpreader.tools.doctor.access`. They judge the facts that
:mod:`mpreader.tools.doctor.facts` gathers, and look up nothing themselves but certificate files and pool settings.
"""

from __future__ import annotations

import os
import resource
import shlex
import ssl
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Final

from mpreader.config import POOL_SETTINGS, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.pool.sizing import PoolSizes, size_pool
from mpreader.ranks import local_ranks
from mpreader.tools.doctor.facts import HostFacts
from mpreader.tools.doctor.finding import Finding
from mpreader.version import __version__

__all__ = ["examine_host", "files_needed"]

_GiB: Final = 1024 * MiB
_UNLIMITED: Final = 1 << 60  # bytes or descriptors; an integer, so that sizes can be computed with it
_PACKAGES: Final = {
    "torch": "checkpoints can't be loaded without it; ranges can be fetched",
    "isal": "CRC-32 is some eight times slower without it",
}
# Descriptors besides those of the pool.
_CLIENT_FILES: Final = 32  # connections of boto3
_SPARE_FILES: Final = 16  # files that an interpreter opens for a moment, such as the modules that it imports
_KNOWN_VARIABLES: Final = [*(f"MPREADER_{name.upper()}" for name in POOL_SETTINGS), "MPREADER_PROGRESS"]
_CA_VARIABLES: Final = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")


def examine_host(facts: HostFacts, s3client_config: S3ClientConfig, pool_config: PoolConfig) -> Iterator[Finding]:
    """Check what needs no network.

    Args:
        facts: Facts of the host.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
    """
    yield from _packages(facts.versions)
    yield from _variables(facts.environment)
    yield from _certificates(facts.environment)
    # The pool that would be made if memory were unlimited: the free memory is compared with what this pool needs.
    roomy = replace(facts.host, free_memory=_UNLIMITED, free_shm=_UNLIMITED)
    try:
        wanted = size_pool(pool_config, s3client_config, roomy)
        asked_for = (pool_config.value("max_memory") or 0) * facts.host.sharers
    except ConfigError as error:
        # The error is of one setting, maybe an argument's; the remedy names all variables that are wrong.
        wrong = " ".join(f"MPREADER_{name.upper()}" for name in POOL_SETTINGS if _is_wrong(name))
        remedy = f"correct it, or: unset {wrong}"
        yield Finding("pool", "fail", "a setting is wrong", str(error), remedy)
        return
    # All ranks of this host run a pool like this one, and share its memory.
    yield _cores(facts)
    if facts.refused_calls:
        refused = f"{' and '.join(facts.refused_calls)} refused"
        problem = "shared memory or the end of a worker is had in a slower way"
        remedy = "Linux 5.3 or newer, and a container that allows these calls: docker run --security-opt seccomp=…"
        yield Finding("system calls", "warn", refused, problem, remedy)
    window = wanted.window_bytes * facts.host.sharers
    # A pool takes at most half of the free memory and 80 % of /dev/shm (mpreader.pool.sizing), so this much must be
    # free for the window to fit. max_memory, if it was set, is taken as it is.
    yield _memory(facts, max(2 * window, asked_for), asked_for)
    yield _shared_memory(facts, max(window * 10 // 8, asked_for), asked_for, wanted.block_bytes)
    try:
        sizes = size_pool(pool_config, s3client_config, facts.host)
    except ConfigError as error:
        yield Finding("pool", "fail", "can't be made", str(error), "see memory and shared memory above")
        return
    yield _pool(facts, sizes)
    yield _files(facts, sizes)


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
    # All that are set are checked: boto3 and the http(s) sources each follow others of them.
    for name, path in given.items():
        problem = _try_certificates(path)
        if problem is not None:
            remedy = f"unset {name}, or: export {name}=/path/to/authorities.pem"
            yield Finding("certificates", "fail", f"{name}={path}", problem, remedy)
        else:
            yield Finding("certificates", "ok", f"those of {name}={path}")
    if not given:
        yield Finding("certificates", "ok", "the usual ones")
    if environment.get("AWS_CA_BUNDLE") == "":  # set, but empty
        yield Finding(
            "certificates", "warn", "AWS_CA_BUNDLE=", "newer boto3 refuses an empty one", "unset AWS_CA_BUNDLE"
        )


def _cores(facts: HostFacts) -> Finding:
    cores, quota, sharers = facts.host.cores, facts.cgroup.cores, facts.host.sharers
    value = f"{cores} of {facts.all_cores} usable, CPU quota " + ("none" if quota is None else f"{quota:g}")
    if sharers > 1:
        value += f", shared by {sharers} ranks (by {local_ranks(facts.environment).source or 'the launcher'})"
    if cores < 2 <= facts.all_cores:  # where the host has only one, there is no remedy
        problem = "receiving and decoding take turns on one core"
        free = f"taskset -c 0-{facts.all_cores - 1} python …"
        remedy = f"docker run --cpus=4 …, srun --cpus-per-task=4 …, or where there is no limit: {free}"
        return Finding("cores", "warn", value, problem, remedy)
    return Finding("cores", "ok", value)


def _memory(facts: HostFacts, wanted: int, asked_for: int) -> Finding:
    free, cgroup = facts.host.free_memory, facts.cgroup
    limit = "none" if cgroup.memory_bytes is None else _size(cgroup.memory_bytes)
    kind = f" (cgroup v{cgroup.version})" if cgroup.version else ""
    value = f"{_size(free)} free of {_size(facts.memory_bytes)}, limit {limit}{kind}"
    if free < wanted:
        remedy = "end what takes the memory: ps aux --sort=-rss | head"
        if cgroup.memory_bytes is not None:
            remedy = f"docker run --memory={_gib(cgroup.memory_bytes - free + wanted)}g …, or {remedy}"
        return _shortage("memory", value, facts, wanted, asked_for, free // 2, remedy)
    return Finding("memory", "ok", value)


def _shared_memory(facts: HostFacts, wanted: int, asked_for: int, segment_bytes: int) -> Finding:
    free, size = facts.host.free_shm, facts.shm_bytes
    if facts.file_bytes is not None and facts.file_bytes < segment_bytes:
        problem = f"it obeys the limit of file sizes, and a piece of it takes {_size(segment_bytes)}"
        limited = f"files of {facts.file_bytes} bytes at most"
        return Finding("shared memory", "fail", limited, problem, "ulimit -f unlimited")
    if free is None:
        return Finding("shared memory", "ok", "bounded by the free memory, not by /dev/shm")
    value = f"{_size(free)} free of {_size(size)} in /dev/shm"
    larger = f"docker run --shm-size={_gib(wanted)}g …, or: sudo mount -o remount,size={_gib(wanted)}g /dev/shm"
    if not size:
        remedy = "sudo mkdir -p /dev/shm && sudo mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
        problem = "there is nothing to receive into: memfd_create is refused, too"
        return Finding("shared memory", "fail", "no /dev/shm", problem, remedy)
    if free >= wanted:
        return Finding("shared memory", "ok", value)
    remedy = f"remove what is stale: ls -lS /dev/shm; or: {larger}" if size >= wanted else larger
    return _shortage("shared memory", value, facts, wanted, asked_for, free * 8 // 10, remedy)


def _shortage(name: str, value: str, facts: HostFacts, wanted: int, asked_for: int, spare: int, remedy: str) -> Finding:
    """Finding for memory of which less is free than ``wanted``.

    Args:
        name: Subject of the check.
        value: The state that was found.
        facts: Facts of the host.
        wanted: Bytes that must be free, for all ranks of the host.
        asked_for: Those of them that ``max_memory`` asks for; 0 if it is not set.
        spare: Bytes that all ranks together may take of what is free.
        remedy: Command that makes more memory free.
    """
    # A pool works with less memory than it wants, but fails with less than the user asked for.
    if asked_for == wanted:
        problem = f"{_size(asked_for)} are asked for (max_memory): a load that needs them fails"
        remedy = f"export MPREADER_MAX_MEMORY={max(1, spare // facts.host.sharers // MiB)}MiB; or: {remedy}"
    else:
        problem = f"the pool wants {_size(wanted)}: with less, fewer connections are busy, with smaller requests"
    return Finding(name, "warn", value, problem, remedy)


def _pool(facts: HostFacts, sizes: PoolSizes) -> Finding:
    ranks = f", for each of {facts.host.sharers} ranks" if facts.host.sharers > 1 else ""
    workers = "1 worker" if sizes.workers == 1 else f"{sizes.workers} workers"
    return Finding(
        "pool",
        "ok",
        f"{workers} with up to {sizes.connections_per_worker} connections, requests of {_size(sizes.part_bytes)}, "
        f"{_size(sizes.window_bytes)} read ahead, at most {_size(sizes.max_bytes)} of shared memory{ranks}",
    )


def _files(facts: HostFacts, sizes: PoolSizes) -> Finding:
    soft, hard = (_UNLIMITED if limit == resource.RLIM_INFINITY else limit for limit in facts.files)
    needed = files_needed(sizes, facts.open_files)
    value = f"{'any number' if soft == _UNLIMITED else soft} allowed, {needed} needed"
    if soft >= needed:
        return Finding("descriptors", "ok", value)
    # The remedy allows half as many again, for files of the program, rounded up to a power of two.
    ask = 1 << (needed * 3 // 2).bit_length()
    if hard >= needed:
        remedy = f"ulimit -n {min(ask, hard)}"
    else:
        remedy = f"docker run --ulimit nofile={ask} …, LimitNOFILE={ask} of the service, or /etc/security/limits.conf"
    return Finding("descriptors", "fail", value, "workers and connections fail for want of descriptors", remedy)


def files_needed(sizes: PoolSizes, open_files: int) -> int:
    """Descriptors that the main process, or a worker if it needs more, may have open at one time.

    Args:
        sizes: Sizes of the pool.
        open_files: Descriptors that the main process has open without a pool.
    """
    segments = -(-sizes.window_bytes // sizes.segment_bytes)
    # Of a worker: socket, pidfd, stderr. Of a segment: itself and its mapping. Besides: epoll and wake-up.
    main = open_files + 3 * sizes.workers + 2 * segments + _CLIENT_FILES
    # Of a connection: itself and its thread's statistics.
    worker = 2 * sizes.connections_per_worker + segments
    return max(main, worker) + _SPARE_FILES


def _try_certificates(path: str) -> str | None:
    """Fault of a file, or folder, of certificate authorities, in words; None if there is none."""
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
