"""The doctor finds the faults of the access to S3, names them, and tells the remedy of each."""

from __future__ import annotations

import contextlib
import json
import os
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

from mpreader import ConfigError, S3Client, S3ClientConfig
from mpreader.config import MiB
from mpreader.testing import Fault, FaultKind, FaultServer, S3Server
from mpreader.testing.s3_server import aws_environment as environment_of
from mpreader.tools.doctor.access import examine_access
from mpreader.tools.doctor.examine import examine
from mpreader.tools.doctor.finding import Finding


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MPREADER_")]:
        monkeypatch.delenv(name)


def check(finding: Finding, status: str, problem: str, remedy: str) -> None:
    """That it was found, with these texts in what is said of it."""
    assert finding.status == status, finding
    assert problem in (finding.problem or ""), finding
    assert remedy in (finding.remedy or ""), finding
    assert bool(finding.problem) == bool(finding.remedy) == (status != "ok"), finding


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


@pytest.mark.parametrize(
    ("headers", "is_told"),
    [
        ({}, True),
        ({"ETag": ""}, True),
        ({"ETag": 'W/"1"', "Last-Modified": ""}, True),
        ({"ETag": "", "Last-Modified": "", "x-amz-version-id": "1"}, True),
        ({"ETag": "", "Last-Modified": ""}, False),
    ],
)
def test_a_service_that_tells_no_versions_apart_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], is_told: bool
) -> None:
    # It can't be listed, so that the object with the name of the prefix is read.
    with FaultServer({}, [Fault(FaultKind.STATUS, path="/bucket", status=403)]) as server:
        server.put("/bucket/run/.metadata", b"x", headers)
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        findings = of_service("s3://bucket/run")
    assert ("object versions" not in findings) is is_told
    if not is_told:
        check(findings["object versions"], "warn", "told apart", "under a name of its own")


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
