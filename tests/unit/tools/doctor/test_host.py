"""The doctor finds the faults of a host, names them, and tells the remedy of each."""

from __future__ import annotations

import dataclasses
import os
import resource
import sys
from typing import Any

import pytest

from mpreader import PoolConfig, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.host import Cgroup, Host
from mpreader.pool.sizing import size_pool
from mpreader.tools.doctor.examine import examine
from mpreader.tools.doctor.facts import HostFacts
from mpreader.tools.doctor.finding import Finding
from mpreader.tools.doctor.host import examine_host, files_needed

GiB = 1024 * MiB


HEALTHY = HostFacts(
    all_cores=16,
    memory_bytes=128 * GiB,
    host=Host(cores=16, free_memory=64 * GiB, free_shm=32 * GiB),
    cgroup=Cgroup(),
    shm_bytes=32 * GiB,
    open_files=10,
    files=(65536, 65536),
    versions={"torch": "2.13.0", "boto3": "1.40.0", "isal": "1.7.0"},
    environment={"MPREADER_WORKERS": "4", "MPREADER_PROGRESS": "0", "PATH": "/bin"},
)


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MPREADER_")]:
        monkeypatch.delenv(name)


def host(**facts: Any) -> dict[str, Host]:
    return {"host": dataclasses.replace(HEALTHY.host, **facts)}


def of_host(config: PoolConfig | None = None, **facts: Any) -> dict[str, Finding]:
    host_facts = dataclasses.replace(HEALTHY, **facts)
    return {finding.name: finding for finding in examine_host(host_facts, S3ClientConfig(), config or PoolConfig())}


def check(finding: Finding, status: str, problem: str, remedy: str) -> None:
    """That it was found, with these texts in what is said of it."""
    assert finding.status == status, finding
    assert problem in (finding.problem or ""), finding
    assert remedy in (finding.remedy or ""), finding
    assert bool(finding.problem) == bool(finding.remedy) == (status != "ok"), finding


def test_a_healthy_host_has_nothing_wrong() -> None:
    findings = of_host()
    for finding in findings.values():
        check(finding, "ok", "", "")
    assert findings["pool"].value.startswith(
        "8 workers with up to 16 connections, requests of 8 MiB, 1,280 MiB read ahead"
    )


@pytest.mark.parametrize(
    ("facts", "name", "status", "problem", "remedy"),
    [
        ({"versions": {**HEALTHY.versions, "torch": None}}, "torch", "warn", "checkpoints", "-m pip install torch"),
        ({"versions": {**HEALTHY.versions, "isal": None}}, "isal", "warn", "slower", "-m pip install isal"),
        (host(cores=1), "cores", "warn", "one core", "docker run --cpus="),
        (host(free_memory=2 * GiB), "memory", "warn", "wants 2,560 MiB", "ps aux"),
        (
            {**host(free_memory=GiB), "cgroup": Cgroup(2, None, 2 * GiB, GiB)},
            *("memory", "warn", "wants 2,560 MiB", "docker run --memory=4g"),
        ),
        (
            {"shm_bytes": 64 * MiB, **host(free_shm=64 * MiB)},
            *("shared memory", "warn", "wants 1,600 MiB", "docker run --shm-size=2g"),
        ),
        (host(free_shm=100 * MiB), "shared memory", "warn", "wants", "ls -lS /dev/shm"),
        ({"shm_bytes": 0, **host(free_shm=0)}, "shared memory", "fail", "nothing", "mount -t tmpfs"),
        ({"refused_calls": ("memfd_create", "pidfd_open")}, "system calls", "warn", "slower", "Linux 5.3"),
        ({"file_bytes": MiB, **host(free_shm=None)}, "shared memory", "fail", "file sizes", "ulimit -f unlimited"),
        (host(free_shm=100_000), "pool", "fail", "too little memory", "above"),
        ({"files": (50, 65536)}, "descriptors", "fail", "want of descriptors", "ulimit -n 512"),
        ({"files": (50, 50)}, "descriptors", "fail", "want of descriptors", "docker run --ulimit nofile=512"),
        (
            {"environment": {"MPREADER_WORKRES": "4"}},
            "settings",
            "warn",
            "no setting",
            "did you mean MPREADER_WORKERS?",
        ),
        ({"environment": {"AWS_CA_BUNDLE": "/none/ca.pem"}}, "certificates", "fail", "no such file", "unset AWS_CA"),
        ({"environment": {"AWS_CA_BUNDLE": ""}}, "certificates", "warn", "empty", "unset AWS_CA_BUNDLE"),
        ({"environment": {"SSL_CERT_FILE": __file__}}, "certificates", "fail", "PEM", "export SSL_CERT_FILE="),
    ],
)
def test_what_is_wrong_with_a_host_is_found(
    facts: dict[str, Any], name: str, status: str, problem: str, remedy: str
) -> None:
    check(of_host(**facts)[name], status, problem, remedy)


def test_a_setting_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_WORKERS", "two")
    check(of_host()["pool"], "fail", "MPREADER_WORKERS='two'", "unset MPREADER_WORKERS")


def test_more_memory_than_there_is_is_found() -> None:
    findings = of_host(PoolConfig(max_memory=40 * GiB), **host(free_memory=30 * GiB))
    check(findings["memory"], "warn", "40 GiB are asked for", "export MPREADER_MAX_MEMORY=15360MiB")
    check(findings["shared memory"], "warn", "40 GiB are asked for", "export MPREADER_MAX_MEMORY=26214MiB")


def test_ranks_of_a_host_share_it() -> None:
    assert of_host(None, **host(sharers=8))["pool"].value.startswith("2 workers")
    check(of_host(None, **host(sharers=8, free_shm=2 * GiB))["shared memory"], "warn", "wants 3,200 MiB", "ls -lS")


def test_shared_memory_that_needs_no_dev_shm_is_bounded_by_nothing_else() -> None:
    findings = of_host(None, shm_bytes=0, **host(free_shm=None))
    check(findings["shared memory"], "ok", "", "")
    check(findings["pool"], "ok", "", "")


def test_the_launcher_that_tells_of_other_ranks_is_named() -> None:
    environment = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_TASKS_PER_NODE": "8"}
    findings = of_host(None, environment=environment, **host(sharers=8))
    assert findings["cores"].value.endswith("shared by 8 ranks (by SLURM_STEP_TASKS_PER_NODE)")


def test_this_host_is_measured() -> None:
    facts = HostFacts.now()
    assert 1 <= facts.host.cores <= facts.all_cores
    assert facts.host.free_shm is None or 0 < facts.host.free_shm <= facts.shm_bytes
    assert facts.host.free_memory <= facts.memory_bytes
    assert facts.files == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert facts.open_files == len(os.listdir("/proc/self/fd")) - 1
    assert facts.versions["boto3"]


def test_more_of_a_pool_needs_more_descriptors() -> None:
    def needed(workers: int, connections: int, open_files: int = 0) -> int:
        config = PoolConfig(workers=workers, connections_per_worker=connections, part_size=256 * KiB)
        return files_needed(size_pool(config, S3ClientConfig(), HEALTHY.host), open_files)

    assert needed(1, 16) < needed(8, 16) < needed(64, 16) < needed(64, 512)
    assert needed(1, 400) > 2 * 400, "a worker's connections, and what it reads their threads' waits from"
    assert needed(8, 16, open_files=1000) == needed(8, 16) + 1000


def test_another_system_is_the_one_thing_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    [finding] = examine()
    monkeypatch.undo()
    check(finding, "fail", "Linux", "docker run")
