"""The doctor finds the faults of a host and of its access to S3, names them, and tells the remedy of each."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mpreader import ConfigError, PoolConfig, S3Client, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.host import Cgroup, Host
from mpreader.pool.sizing import size_pool
from mpreader.testing import FaultServer, S3Server
from mpreader.testing.s3_server import aws_environment as environment_of
from mpreader.tools.doctor.access import examine_access
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


def host(**facts: int) -> dict[str, Host]:
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


def test_this_host_is_measured() -> None:
    facts = HostFacts.now()
    assert 1 <= facts.host.cores <= facts.all_cores
    assert 0 < facts.host.free_shm <= facts.shm_bytes
    assert facts.host.free_memory <= facts.memory_bytes
    assert facts.files == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert facts.open_files == len(os.listdir("/proc/self/fd")) - 1
    assert facts.versions["boto3"]


def test_descriptors_that_are_said_to_be_enough_are_enough() -> None:
    program = """
import os, resource, sys
from mpreader import PoolConfig, RangeFetcher, S3ClientConfig
from mpreader.tools.doctor.host import files_needed
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
config = PoolConfig(workers=3, connections_per_worker=20, part_size=65536)
needed = files_needed(size_pool(config, S3ClientConfig(), Host.now()), len(os.listdir("/proc/self/fd")) - 1)
resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed))
with RangeFetcher(pool_config=config) as fetcher:
    views = fetcher.fetch(sys.argv[1], [(start, start + 65536) for start in range(0, 16 << 20, 65536)])
    print(sum(map(len, views)), fetcher.stats.retries, fetcher.stats.restarts)
"""
    with FaultServer({"/object": bytes(16 * MiB)}, bytes_per_s=4e6) as server:
        done = subprocess.run(
            [sys.executable, "-c", program, server.url("/object")], capture_output=True, text=True, timeout=60
        )
    assert (done.stdout.split(), done.stderr) == ([f"{16 * MiB}", "0", "0"], "")


def test_more_of_a_pool_needs_more_descriptors() -> None:
    def needed(workers: int, connections: int, open_files: int = 0) -> int:
        config = PoolConfig(workers=workers, connections_per_worker=connections, part_size=256 * KiB)
        return files_needed(size_pool(config, S3ClientConfig(), HEALTHY.host), open_files)

    assert needed(1, 16) < needed(8, 16) < needed(64, 16) < needed(64, 512)
    assert needed(1, 400) > 2 * 400, "a worker's connections, and what it reads their threads' waits from"
    assert needed(8, 16, open_files=1000) == needed(8, 16) + 1000


# -- control groups


def tree(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{path}": files[path] for path in files}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def memory_v2(folder: str, limit: str, used: int = 0, cache: int = 0) -> dict[str, str]:
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": f"{used}\n",
        f"{folder}memory.stat": f"anon 1\ninactive_file {cache}\n",
    }


V2 = {"cgroup.controllers": "cpu memory\n"}
V1_MEMORY = {
    "memory/docker/x/memory.limit_in_bytes": "1000\n",
    "memory/docker/x/memory.usage_in_bytes": "300\n",
    "memory/docker/x/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
}


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {**V2, "cpu.max": "max 100000\n", **memory_v2("", "max\n")}, Cgroup(2)),
        (
            "0::/\n",
            {**V2, "cpu.max": "150000 100000\n", **memory_v2("", "1000\n", 300, 100)},
            Cgroup(2, 1.5, 1000, 800),
        ),
        (  # a group above is tighter
            "0::/slurm/job/step\n",
            {
                **V2,
                **memory_v2("slurm/job/", "900\n", 100),
                **memory_v2("slurm/job/step/", "max\n"),
                "slurm/cpu.max": "2 1",
            },
            Cgroup(2, 2.0, 900, 800),
        ),
        (  # a container whose path is that of the host
            "3:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n",
            {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n", **V1_MEMORY},
            Cgroup(1, 2.5, 1000, 800),
        ),
        (  # version 1 without limits, and one of version 2 besides it without controllers
            "4:memory:/\n1:cpu:/\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1\n",
                "cpu/cpu.cfs_period_us": "100000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.usage_in_bytes": "5\n",
                "memory/memory.stat": "",
            },
            Cgroup(1),
        ),
        ("0::/../..\n", {**V2, "cpu.max": "1 2\n"}, Cgroup(2, 0.5)),
        ("", {"cgroup": ""}, Cgroup(0)),
    ],
    ids=["v2", "v2 limits", "v2 nested", "v1 limits", "v1", "namespace", "none"],
)
def test_limits_of_control_groups_are_read(
    tmp_path: Path, groups: str, files: dict[str, str], expected: Cgroup
) -> None:
    assert Cgroup.of(tree(tmp_path, groups, files)) == expected


def test_a_host_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert Cgroup.of(tmp_path) == Cgroup(0)


# -- the way to S3

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAVERYSECRETKEYID1",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/very+secret",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD//very//secret//token",
}
LISTING = (
    "<ListBucketResult><KeyCount>1</KeyCount><Contents><Key>run/.metadata</Key><Size>1</Size></Contents>"
    "</ListBucketResult>"
)


class Service(ThreadingHTTPServer):
    """An S3 of one bucket that says what it is told to say.

    Attributes:
        ahead: Time by which its clock is ahead of ours.
        region: The bucket's region; "": it tells none.
        refused: S3's code for what it refuses, by kind of request: ``"head"``, ``"list"``, ``"read"``.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ahead = timedelta()
        self.region = ""
        self.refused: dict[str, tuple[int, str]] = {}


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_HEAD(self) -> None:
        self._answer("head", 200, "")

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            self._answer("list", 200, LISTING)
        else:
            self._answer("read", 206, "x")

    def _answer(self, kind: str, status: int, body: str) -> None:
        if kind in self.server.refused:
            status, code = self.server.refused[kind]
            # As a service might that repeats what it was sent.
            told = f"Credential {self.headers['Authorization']} {self.headers['x-amz-security-token']}"
            body = "" if kind == "head" else f"<Error><Code>{code}</Code><Message>refused: {told}</Message></Error>"
        self.send_response(status)
        if self.server.region:
            self.send_header("x-amz-bucket-region", self.server.region)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def date_time_string(self, timestamp: float | None = None) -> str:
        return format_datetime(datetime.now(timezone.utc) + self.server.ahead, usegmt=True)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make an environment of these variables alone, as far as AWS and proxies go."""

    def use(**settings: str) -> None:
        for name in list(os.environ):
            if name.startswith(("AWS_", "REQUESTS_", "SSL_CERT_")) or name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture
def service(use: Callable[..., None]) -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        use(**{**environment_of(f"http://127.0.0.1:{server.server_port}"), **SECRETS})
        yield server
        server.shutdown()
        thread.join()


def of_service(source: str | None = None, limit_s: float = 5.0, **config: Any) -> dict[str, Finding]:
    findings = list(examine_access(source, S3ClientConfig(**config), limit_s))
    told = repr(findings)
    assert not any(secret in told for secret in (*SECRETS.values(), "sesame"))
    return {finding.name: finding for finding in findings}


def test_a_bucket_that_can_be_read_has_nothing_wrong(bucket: str, s3_server: S3Server) -> None:
    client = S3Client()
    with client.put_object(bucket, "checkpoint/.metadata") as writer:
        writer.write(b"x")
    client.close()
    findings = of_service(f"s3://{bucket}/checkpoint")
    assert list(findings) == ["proxy", "name", "endpoint", "clock", "region", "credentials", "bucket"]
    for finding in findings.values():
        check(finding, "ok", "", "")
    assert findings["name"].value == "127.0.0.1 has 1 address: 127.0.0.1"
    assert findings["bucket"].value == f"s3://{bucket}/checkpoint may be read (checkpoint/.metadata) and listed"
    assert of_service()["endpoint"].value.startswith(f"{s3_server.endpoint_url} answers within ")


def test_a_bucket_or_prefix_that_is_none_is_found(bucket: str) -> None:
    check(of_service("s3://my-buckte/run")["bucket"], "fail", "no such bucket", "aws s3 ls")
    check(of_service(f"s3://{bucket}/runs/on")["bucket"], "fail", "no object", f"aws s3 ls s3://{bucket}/runs/")
    check(of_service(f"s3://{bucket}")["bucket"], "ok", "", "")
    check(of_service("s3://Not_A_Bucket!/run")["settings of S3"], "fail", "Not_A_Bucket!", "aws configure list")


@pytest.mark.parametrize(
    ("ahead_s", "status", "value"),
    [
        (0, "ok", "as the service's"),
        (-30, "ok", "30 s ahead of the service's"),
        (-90, "warn", "90 s ahead of the service's"),
        (240, "warn", "240 s behind the service's"),
        (3600, "fail", "3,600 s behind the service's"),
        (-3600, "fail", "3,600 s ahead of the service's"),
    ],
)
def test_a_clock_that_is_wrong_is_found(service: Service, ahead_s: int, status: str, value: str) -> None:
    service.ahead = timedelta(seconds=ahead_s)
    finding = of_service("s3://bucket/run")["clock"]
    check(finding, status, "" if status == "ok" else "15 minutes", "" if status == "ok" else "chronyc makestep")
    seconds = value.split()[0]
    near = {value, *(value.replace(seconds, f"{abs(ahead_s) + more:,}") for more in (-1, 1)), "as the service's"}
    assert finding.value in near - ({"as the service's"} if ahead_s else set())


def test_a_bucket_of_another_region_is_found(service: Service) -> None:
    service.region = "eu-west-1"
    check(of_service("s3://bucket/run")["region"], "warn", "eu-west-1", "export AWS_DEFAULT_REGION=eu-west-1")
    check(of_service("s3://bucket/run", region="us-west-2")["region"], "warn", "eu-west-1", "--region eu-west-1")
    check(of_service("s3://bucket/run", region="eu-west-1")["region"], "ok", "", "")


def test_a_variable_that_boto3_does_not_read_is_found(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    check(of_service()["region"], "warn", "AWS_REGION=eu-west-1", "export AWS_DEFAULT_REGION=eu-west-1")


def test_a_service_that_is_not_well_is_found(service: Service) -> None:
    service.refused = {"head": (503, "")}
    check(of_service()["endpoint"], "warn", "HTTP 503", "try again")


@pytest.mark.parametrize(
    ("refused", "status", "problem", "remedy"),
    [
        (
            {"list": (403, "AccessDenied")},
            "warn",
            "not be listed",
            '"s3:ListBucket", "Resource": "arn:aws:s3:::bucket"',
        ),
        (
            {"read": (403, "AccessDenied")},
            "fail",
            "access denied",
            '"s3:GetObject", "Resource": "arn:aws:s3:::bucket/run*"',
        ),
        (dict.fromkeys(("list", "read"), (403, "AccessDenied")), "fail", "access denied", '"s3:GetObject"'),
        (dict.fromkeys(("list", "read"), (400, "ExpiredToken")), "fail", "expired", "aws sso login"),
        (dict.fromkeys(("list", "read"), (403, "InvalidAccessKeyId")), "fail", "unknown", "aws configure"),
        (dict.fromkeys(("list", "read"), (403, "SignatureDoesNotMatch")), "fail", "secret key", "aws sts"),
        (dict.fromkeys(("list", "read"), (403, "RequestTimeTooSkewed")), "fail", "clock", "chronyc makestep"),
        ({"list": (500, "InternalError")}, "fail", "failed", "aws s3 ls s3://bucket/run"),
    ],
    ids=lambda value: ",".join(f"{key} {value[key][1]}" for key in value) if isinstance(value, dict) else None,
)
def test_what_a_bucket_refuses_is_found(
    service: Service, refused: dict[str, tuple[int, str]], status: str, problem: str, remedy: str
) -> None:
    service.refused = {**refused, "head": (403, "")}
    findings = of_service("s3://bucket/run")
    check(findings["bucket"], status, problem, remedy)
    assert findings["endpoint"].status == "ok", "a refusal is an answer"


def test_a_service_that_redirects_without_naming_a_region_is_found(service: Service) -> None:
    service.refused = dict.fromkeys(("head", "list", "read"), (301, "PermanentRedirect"))
    finding = of_service("s3://bucket/run")["bucket"]
    check(finding, "fail", "redirects the request", "aws s3 ls s3://bucket/run")
    check(finding, "fail", "check endpoint_url, and S3ClientConfig(region=…)", "")


# -- credentials


def files(monkeypatch: pytest.MonkeyPatch, folder: Path, *, config: str = "", credentials: str = "") -> None:
    """Have these AWS files instead of the environment's credentials."""
    for name, variable, text in (
        ("config", "AWS_CONFIG_FILE", config),
        ("credentials", "AWS_SHARED_CREDENTIALS_FILE", credentials),
    ):
        (folder / name).write_text(text)
        monkeypatch.setenv(variable, str(folder / name))
    for name in SECRETS:
        monkeypatch.delenv(name)


def keys(**more: str) -> str:
    settings = {**{name.lower(): value for name, value in SECRETS.items()}, **more}
    return "[default]\n" + "\n".join(f"{name} = {value}" for name, value in settings.items())


def process(expires: str | None) -> str:
    """A profile whose credential_process prints these."""
    names = dict(zip(("AccessKeyId", "SecretAccessKey", "SessionToken"), SECRETS.values(), strict=True))
    return f"[default]\ncredential_process = echo '{json.dumps({'Version': 1, **names, 'Expiration': expires})}'"


def at(minutes: int) -> str:
    return (datetime.now(timezone.utc) + timedelta(minutes=minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_missing_credentials_are_found(service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files(monkeypatch, tmp_path)
    findings = of_service("s3://bucket/run")
    check(findings["credentials"], "fail", "nothing to sign", "aws configure")
    assert findings["endpoint"].status == "ok", "the service is asked all the same"
    assert "bucket" not in findings
    unsigned = of_service("s3://bucket/run", unsigned=True)
    assert (unsigned["credentials"].status, unsigned["bucket"].status) == ("ok", "ok")


@pytest.mark.parametrize("source", ["environment", "file", "process"])
@pytest.mark.parametrize(("minutes", "status"), [(-1, "fail"), (5, "warn"), (300, "ok")])
def test_expiry_of_credentials_is_told(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, minutes: int, status: str
) -> None:
    expires = at(minutes)
    if source == "environment":
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", expires)
    elif source == "file":
        files(monkeypatch, tmp_path, credentials=keys(x_security_token_expires=expires))
    else:
        files(monkeypatch, tmp_path, config=process(expires))
    if (source, status) == ("process", "warn"):
        status = "ok"  # they are renewed
    finding = of_service("s3://bucket/run")["credentials"]
    check(finding, status, {"fail": "have expired", "warn": "expire soon", "ok": ""}[status], "")
    assert source in finding.value
    assert f"good until {expires[:10]} {expires[11:16]} UTC" in finding.value


@pytest.mark.parametrize(
    ("config", "credentials", "status", "problem", "remedy"),
    [
        ("", keys(), "ok", "", ""),
        (process(None), "", "ok", "", ""),
        (
            "[default]\ncredential_process = sh -c 'echo no network >&2; exit 1'",
            "",
            "fail",
            "no network",
            "aws configure",
        ),
        ("[default]\ncredential_process = echo this is no JSON", "", "fail", "", "aws configure list"),
        ("[default\n", "", "fail", "parse", "aws configure list"),
        ("", "[default]\naws_access_key_id = AKIA", "fail", "aws_secret_access_key", "aws configure list"),
        (
            "",
            "[default]\naws_access_key_id = ASIA1\naws_secret_access_key = x",
            "fail",
            "session token",
            "AWS_SESSION_TOKEN",
        ),
        ("[default]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = y\nmfa_serial = z", "", "fail", "MFA", "aws"),
    ],
    ids=["file", "process", "failed process", "bad process", "bad file", "no secret key", "no token", "MFA"],
)
def test_credentials_of_files_are_examined(
    *,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    config: str,
    credentials: str,
    status: str,
    problem: str,
    remedy: str,
) -> None:
    files(monkeypatch, tmp_path, config=config, credentials=credentials)
    findings = of_service("s3://bucket/run")
    check(findings.get("credentials") or findings["settings of S3"], status, problem, remedy)


def test_a_profile_that_is_none_or_not_used_is_found(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    check(of_service(profile="nobody")["settings of S3"], "fail", "nobody", "--profile")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    findings = of_service()
    check(findings["settings of S3"], "fail", "mine", "--profile")


def test_keys_of_the_environment_that_hide_a_profile_are_found(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text("[profile mine]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    check(of_service()["credentials"], "warn", "not the profile mine", "unset AWS_ACCESS_KEY_ID")


# -- no answer


def test_an_endpoint_that_is_none_is_found(service: Service) -> None:
    closed = of_service("s3://bucket/run", endpoint_url="http://me:sesame@127.0.0.1:1")
    check(closed["endpoint"], "fail", "Connection refused", "curl -v --max-time 5 http://127.0.0.1:1/bucket")
    assert "bucket" not in closed
    unknown = of_service(endpoint_url="http://no-such-host.invalid")
    check(unknown["name"], "fail", "no address", "getent hosts no-such-host.invalid")
    assert unknown["endpoint"].status == "fail"
    wrong = of_service(endpoint_url="http://a b")
    check(wrong["settings of S3"], "fail", "http://a b", "--endpoint-url")


def test_a_certificate_that_is_not_trusted_is_found(use: Callable[..., None]) -> None:
    with FaultServer({}, tls=True) as server:
        use(**{name: value for name, value in server.environment().items() if name != "AWS_CA_BUNDLE"})
        check(of_service()["endpoint"], "fail", "CERTIFICATE_VERIFY_FAILED", "export AWS_CA_BUNDLE=")
        use(**server.environment())
        check(of_service()["endpoint"], "ok", "", "")


@pytest.mark.parametrize("proxy", ["http://me:sesame@127.0.0.1:1", "socks5://me:sesame@127.0.0.1:1"])
def test_a_proxy_that_is_wrong_is_found(service: Service, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", proxy)
    findings = of_service("s3://bucket/run")
    if proxy.startswith("http:"):
        assert findings["proxy"].value == "127.0.0.1:1"
        check(findings["endpoint"], "fail", "127.0.0.1:1", "export NO_PROXY=127.0.0.1")
    else:
        check(findings["proxy"], "fail", "socks5", "unset HTTP_PROXY")
    assert "name" not in findings, "the proxy asks for it"


def test_nothing_that_does_not_answer_is_waited_for(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    files(monkeypatch, tmp_path, config=f"[default]\ncredential_process = sh -c 'echo $$ > {pid}; exec sleep 3600'")
    with contextlib.ExitStack() as stack:
        released = threading.Event()
        stack.callback(released.set)
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: released.wait() and [])
        findings = of_service("s3://bucket/run", limit_s=0.5)
        os.kill(int(pid.read_text()), signal.SIGKILL)
    check(findings["name"], "fail", "no answer", "getent hosts")
    check(findings["endpoint"], "fail", "no answer", "curl")
    check(findings["credentials"], "fail", "no answer", "aws configure list")


def test_a_source_that_is_no_uri_is_refused() -> None:
    with pytest.raises(ConfigError, match="s3://"):
        examine("/local/folder")


def test_another_system_is_the_one_thing_that_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    [finding] = examine()
    monkeypatch.undo()
    check(finding, "fail", "Linux", "docker run")
