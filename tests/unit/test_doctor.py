"""What is wrong with a host is found, named, and comes with what mends it."""

from __future__ import annotations

import dataclasses
import datetime
import resource
from typing import Any

import pytest

from mpreader import ConfigError, PoolConfig, S3ClientConfig
from mpreader.access import examine_access
from mpreader.config import MiB
from mpreader.doctor import Finding, Surroundings, examine, examine_host
from mpreader.pool.sizing import Host
from mpreader.testing import S3Server

GiB = 1024 * MiB
HEALTHY = Surroundings(
    platform="linux",
    all_cores=16,
    host=Host(cores=16, free_memory=64 * GiB, free_shm=32 * GiB),
    shm_bytes=32 * GiB,
    files=(65536, 65536),
    versions={"torch": "2.13.0", "boto3": "1.40.0", "isal": "1.7.0"},
    environment={"MPREADER_WORKERS": "4", "MPREADER_PROGRESS": "0", "PATH": "/bin"},
)


def host(**facts: int) -> dict[str, Host]:
    return {"host": dataclasses.replace(HEALTHY.host, **facts)}


def of_host(config: PoolConfig | None = None, **facts: Any) -> dict[str, Finding]:
    around = dataclasses.replace(HEALTHY, **facts)
    return {finding.name: finding for finding in examine_host(around, S3ClientConfig(), config or PoolConfig())}


def test_a_healthy_host_has_nothing_wrong() -> None:
    findings = of_host()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert not any(finding.problem or finding.remedy for finding in findings.values())
    assert "8 workers" in findings["pool"].value


@pytest.mark.parametrize(
    ("facts", "name", "status", "remedy"),
    [
        ({"platform": "darwin"}, "system", "fail", "Linux"),
        ({"versions": {"torch": None, "isal": "1.7.0"}}, "versions", "warn", "pip install 'mpreader[dcp]'"),
        (host(cores=1), "cores", "warn", "--cpus"),
        (host(free_memory=500 * MiB), "memory", "warn", "docker run --memory"),
        ({"shm_bytes": 64 * MiB, **host(free_shm=60 * MiB)}, "shared memory", "warn", "docker run --shm-size=1g"),
        (host(free_shm=100 * MiB), "shared memory", "warn", "ls -lS /dev/shm"),
        (host(free_shm=100_000), "pool", "fail", "more memory"),
        ({"files": (50, 65536)}, "files", "fail", "ulimit -n "),
        ({"files": (50, 50)}, "files", "fail", "--ulimit nofile="),
        ({"environment": {"MPREADER_WORKRES": "4"}}, "settings", "warn", "did you mean MPREADER_WORKERS?"),
        ({"environment": {"AWS_CA_BUNDLE": "/none/ca.pem"}}, "certificates", "fail", "unset AWS_CA_BUNDLE"),
    ],
)
def test_what_is_wrong_with_a_host_is_found(facts: dict[str, Any], name: str, status: str, remedy: str) -> None:
    finding = of_host(**facts)[name]
    assert finding.status == status
    assert finding.problem
    assert remedy in finding.remedy


def test_descriptors_that_are_said_to_be_enough_are_enough_for_many_workers_only() -> None:
    few, many = (of_host(PoolConfig(workers=workers), files=(200, 200))["files"] for workers in (2, 32))
    assert (few.status, many.status) == ("ok", "fail")


def test_a_setting_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_WORKERS", "two")
    finding = of_host()["pool"]
    assert finding.status == "fail"
    assert "MPREADER_WORKERS='two'" in finding.problem


def test_this_host_is_measured() -> None:
    around = Surroundings.now()
    assert 1 <= around.host.cores <= around.all_cores
    assert 0 < around.host.free_shm <= around.shm_bytes
    assert around.files == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert around.versions["boto3"]


# -- the way to S3


def of_service(source: str | None = None, config: S3ClientConfig | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine_access(source, config or S3ClientConfig(region="us-east-1"))}


def test_a_bucket_that_can_be_read_has_nothing_wrong(aws_environment: None, bucket: str, s3_server: S3Server) -> None:
    import boto3

    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="checkpoint/.metadata", Body=b"x")
    client.close()
    findings = of_service(f"s3://{bucket}/checkpoint")
    assert {finding.status for finding in findings.values()} == {"ok"}, findings
    assert findings["credentials"].value == "from environment variables"
    assert "127.0.0.1" in findings["name"].value
    assert findings["access"].value == f"s3://{bucket}/checkpoint can be listed"


def test_a_bucket_or_prefix_that_is_none_is_found(aws_environment: None, bucket: str) -> None:
    assert "no such bucket" in of_service("s3://my-buckte/checkpoint")["access"].problem
    assert "no object" in of_service(f"s3://{bucket}/checkpiont")["access"].problem


def test_missing_credentials_are_found(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    findings = of_service("s3://bucket")
    assert (findings["credentials"].status, findings["credentials"].value) == ("fail", "none")
    assert "aws configure" in findings["credentials"].remedy
    assert findings["service"].status == "ok", "the service is asked all the same"
    assert "access" not in findings
    unsigned = of_service("s3://bucket", S3ClientConfig(region="us-east-1", unsigned=True))
    assert unsigned["credentials"].status == "ok"


@pytest.mark.parametrize(
    ("minutes", "status", "problem"),
    [(-1, "fail", "expired"), (5, "warn", "expire soon"), (300, "ok", "")],
)
def test_expiry_of_credentials_is_told(
    aws_environment: None, monkeypatch: pytest.MonkeyPatch, minutes: int, status: str, problem: str
) -> None:
    expires = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes)
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", expires.strftime("%Y-%m-%dT%H:%M:%SZ"))
    finding = of_service()["credentials"]
    assert finding.status == status
    assert problem in finding.problem
    assert f"good until {expires:%Y-%m-%d %H:%M} UTC" in finding.value


@pytest.mark.parametrize(
    ("wrong_s", "status", "value"),
    [(0, "ok", "the service's"), (120, "warn", "ahead of"), (-3600, "fail", "behind")],
)
def test_a_clock_that_is_wrong_is_found(
    aws_environment: None, bucket: str, monkeypatch: pytest.MonkeyPatch, wrong_s: float, status: str, value: str
) -> None:
    ours = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=wrong_s)
    monkeypatch.setattr("mpreader.s3.account._now", lambda: ours)
    finding = of_service(f"s3://{bucket}")["clock"]
    assert finding.status == status
    assert value in finding.value
    assert ("chronyc makestep" in finding.remedy) is (status != "ok")


def test_a_service_that_does_not_answer_is_found_in_time(aws_environment: None) -> None:
    closed = of_service(config=S3ClientConfig(region="us-east-1", endpoint_url="http://127.0.0.1:1"))
    assert closed["service"].status == "fail"
    assert "--endpoint-url" in closed["service"].remedy
    unknown = of_service(config=S3ClientConfig(region="us-east-1", endpoint_url="http://no-such-host.invalid"))
    assert unknown["name"].status == "fail"
    assert "getent hosts no-such-host.invalid" in unknown["name"].remedy


def test_a_profile_or_uri_that_is_none_is_found(aws_environment: None) -> None:
    finding = of_service(config=S3ClientConfig(profile="nobody"))["settings of S3"]
    assert finding.status == "fail"
    assert "nobody" in finding.problem
    with pytest.raises(ConfigError, match="s3://"):
        examine("/local/folder")
