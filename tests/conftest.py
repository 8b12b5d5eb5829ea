"""Fixtures of all tests: an embedded S3 on request. The leak check and the fault matrix are plugins of their own."""

from __future__ import annotations

import functools
import importlib.util
import os
import secrets
from collections.abc import Iterator

import botocore.session
import hypothesis
import pytest

from mpreader.testing import S3Server

pytest_plugins = ["tests.leak_check", "tests.fault_matrix", "tests.old_torch"]

# Before torch is imported, here and in programs: on busy processors its threads wait for each other in each call.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no mistake, and examples may share a server.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session", autouse=True)
def _process_wide_singletons() -> None:
    """Open what a process opens once and keeps, before any test counts file descriptors."""
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed.checkpoint

        torch.zeros(1).add_(1)
    if importlib.util.find_spec("s3torchconnectorclient") is not None:
        # Its native library opens the source of random numbers when a client is made, and never closes it.
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        MountpointS3Client(region="us-east-1", unsigned=True)
    # Each new session of botocore reads its descriptions of S3 again: 0.06 s, hundreds of times.
    pytest.MonkeyPatch().setattr("botocore.session.create_loader", functools.cache(botocore.session.create_loader))


@pytest.fixture(autouse=True)
def _host_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no other program decide how many parts are in flight: while the host is busy there are fewer."""
    monkeypatch.setattr("mpreader.pool.coordinator.coordinator.is_host_busy", lambda: False)


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
