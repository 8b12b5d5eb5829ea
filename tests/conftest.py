"""What every test gets: an embedded S3 on request, and the proof that it left nothing behind."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing.resource_tracker
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpreader.testing import S3Server

_GRACE_S = 3.0


@pytest.fixture(scope="session", autouse=True)
def _process_wide_singletons() -> None:
    """Open what a process opens once and keeps, before any test counts file descriptors."""
    multiprocessing.resource_tracker.ensure_running()
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed.checkpoint

        torch.zeros(1).add_(1)
    if importlib.util.find_spec("s3torchconnectorclient") is not None:
        # Its native library opens the source of random numbers when a client is made, and never closes it.
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        MountpointS3Client(region="us-east-1", unsigned=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(_process_wide_singletons: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After every test: no child process, shared memory, file descriptor or non-daemon thread more than before."""
    before = _held()
    yield
    caplog.get_records("call").clear()  # torch logs exceptions, whose tracebacks keep clients and their sockets alive
    pool = sys.modules.get("mpreader.pool.pool")
    if pool is not None:
        pool.close_shared_pools()
    deadline = time.monotonic() + _GRACE_S
    left = _held() - before
    while left and time.monotonic() < deadline:
        gc.collect()  # a client dropped in a reference cycle keeps its sockets until then
        threading.Event().wait(0.02)
        left = _held() - before
    assert not left, "left behind: " + ", ".join(sorted(left))


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One embedded S3 for the whole run."""
    with S3Server() as server:
        yield server


@pytest.fixture
def aws_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point boto3, and all that is built on it, to the embedded S3, whatever the developer's own settings are."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3_server: S3Server, aws_environment: None) -> str:
    """Name of a new, empty bucket of the embedded S3."""
    name = f"bucket-{secrets.token_hex(6)}"
    s3_server.create_bucket(name)
    return name


def _held() -> set[str]:
    """Everything that must not outlive a test, in words."""
    held = {f"thread {thread.name}" for thread in threading.enumerate() if not thread.daemon}
    held.update(f"shared memory {entry.name}" for entry in Path("/dev/shm").iterdir())
    held.update(f"process {pid} ({command})" for pid, command in _children())
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that listdir itself had open
        held.add(f"file descriptor {entry} ({target})")
    return held


def _children() -> Iterator[tuple[int, str]]:
    tracker = multiprocessing.resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = re.fullmatch(r"(\d+) \((.*)\) \S (\d+) .*", stat.read_text(), re.DOTALL)
        except OSError:
            continue  # ended meanwhile
        if fields and int(fields[3]) == os.getpid() and int(fields[1]) != tracker:
            yield int(fields[1]), fields[2]
