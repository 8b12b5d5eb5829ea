"""Routes that the server refuses, though it answers HEAD: another kind of route is found, or the error says why not."""

from __future__ import annotations

import base64
import logging
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import AccessDenied, MpreaderError, PoolConfig, RangeFetcher, S3Client, S3ClientConfig, TransportError
from mpreader.dcp import load_checkpoint
from mpreader.s3.session import shared_session
from mpreader.tools.doctor.access import examine_access
from tests.integration.service import (
    ACCESS_KEY,
    ODD_KEYS,
    SECRET_KEY,
    Answer,
    Call,
    Service,
    error,
    set_environment,
    signature_mistake,
)

DATA = bytes(range(256)) * 1024
PART = 64 << 10


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(
        monkeypatch, AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY, AWS_DEFAULT_REGION="eu-west-3"
    )


def refuse_presigned(call: Call) -> Answer | None:
    return error(403, "AccessDenied", "no presigned URLs here") if call.is_presigned else None


Serve = Callable[..., Service]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Service] = []

    def start(hook: Any = refuse_presigned, token: str | None = None, **objects: bytes) -> Service:
        paths = {f"/bucket/{key}": data for key, data in (objects or {"key": DATA}).items()}
        service = Service(paths, hook, {ACCESS_KEY: SECRET_KEY}, token)
        running.append(service.__enter__())
        return service

    yield start
    for service in running:
        service.__exit__()


def _settings(service: Service, **settings: Any) -> S3ClientConfig:
    return S3ClientConfig(endpoint_url=service.url, force_path_style=True, max_attempts=2, **settings)


def _fetcher(config: S3ClientConfig) -> RangeFetcher:
    pool = PoolConfig(workers=2, connections_per_worker=2, max_memory=8 << 20, part_size=PART)
    return RangeFetcher(config, pool)


def _kinds(service: Service) -> list[str]:
    """GETs of objects so far, by the place of their signature."""
    gets = [call for call in service.calls("GET") if "list-type" not in call.query]
    return ["query" if call.is_presigned else "headers" if "authorization" in call.headers else "none" for call in gets]


def test_route_is_signed_in_headers_once_presigned_urls_are_refused(serve: Serve) -> None:
    service = serve()
    config = _settings(service)
    with _fetcher(config) as fetcher:
        assert bytes(fetcher.fetch_object("s3://bucket/key")) == DATA
        assert "query" in _kinds(service)
        assert fetcher.stats.retries == 0  # nothing was refused but the kind of route
        seen = len(service.seen)
        assert bytes(fetcher.fetch("s3://bucket/key", [(5, 100_000)])[0]) == DATA[5:100_000]
    with _fetcher(config) as fetcher:
        assert bytes(fetcher.fetch("s3://bucket/key", [(-5, None)])[0]) == DATA[-5:]
    assert not [call for call in service.seen[seen:] if call.is_presigned], "it is remembered"


def test_one_route_signed_in_headers_serves_every_range(serve: Serve) -> None:
    service = serve()
    with _fetcher(_settings(service, signing="headers")) as fetcher:
        ranges = [(start, start + 10) for start in range(0, len(DATA) - 10, PART)]
        assert [bytes(view) for view in fetcher.fetch("s3://bucket/key", ranges, max_gap_size=0)] == [
            DATA[start:end] for start, end in ranges
        ]
    calls = service.calls("GET")
    assert len(calls) == len(ranges)
    assert len({call.headers["authorization"] for call in calls}) == 1
    assert len({call.headers["range"] for call in calls}) == len(ranges)
    signed = calls[0].headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert not {"range", "if-match"} & set(signed)
    assert {"host", "x-amz-date", "x-amz-content-sha256"} <= set(signed)


@pytest.mark.parametrize("signing", ["auto", "query", "headers"])
@pytest.mark.parametrize("payer", [False, True])
@pytest.mark.parametrize("token", [None, "the/session+token=="])
def test_every_key_and_credential_is_signed_right(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, signing: Any, token: str | None, payer: bool
) -> None:
    def hook(call: Call) -> Answer | None:
        if payer and call.headers.get("x-amz-request-payer", call.query.get("x-amz-request-payer")) != "requester":
            return error(403, "AccessDenied", "who pays?")
        return refuse_presigned(call) if signing == "auto" else None

    if token is not None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    data = {key: f"of {key}".encode() for key in ODD_KEYS}
    service = serve(hook, token, **data)
    with _fetcher(_settings(service, signing=signing, requester_pays=payer)) as fetcher:
        views = fetcher.fetch_many({f"s3://bucket/{key}": [(0, len(data[key]))] for key in ODD_KEYS})
        assert {name: bytes(view) for name, [view] in views.items()} == {
            f"s3://bucket/{key}": content for key, content in data.items()
        }
    assert _kinds(service)[-1] == ("query" if signing == "query" else "headers")


def test_virtual_host_is_signed_in_headers(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    service = serve()
    service.objects = {"/key": DATA, "/a b/ü//c": b"odd"}
    # The service is asked as a proxy, which finds it whatever host name is asked for.
    monkeypatch.setenv("HTTP_PROXY", service.url)
    with _fetcher(S3ClientConfig(endpoint_url="http://s3.store.example", max_attempts=2)) as fetcher:
        assert bytes(fetcher.fetch_object("s3://bucket/key")) == DATA
        assert bytes(fetcher.fetch_object("s3://bucket/a b/ü//c")) == b"odd"
    assert {call.headers["host"] for call in service.calls("GET")} == {"bucket.s3.store.example"}
    assert _kinds(service)[-1] == "headers"


@pytest.mark.parametrize("signing", ["auto", "headers"])
def test_access_point_is_read_by_its_arn(serve: Serve, monkeypatch: pytest.MonkeyPatch, signing: Any) -> None:
    service = serve()
    service.objects = {"/key": DATA}
    monkeypatch.setenv("HTTP_PROXY", service.url)
    config = S3ClientConfig(endpoint_url="http://s3.store.example", max_attempts=2, signing=signing)
    for arn in (
        "arn:aws:s3:eu-west-3:123456789012:accesspoint/my-ap",
        "arn:aws:s3:eu-west-3:123456789012:accesspoint:my-ap",
        "arn:aws-us-gov:s3:us-gov-west-1:123456789012:accesspoint/my-ap",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/my-ap",
    ):
        if "eu-west-3" not in arn:
            monkeypatch.setenv("AWS_DEFAULT_REGION", arn.split(":")[3])
        with _fetcher(config) as fetcher:
            assert bytes(fetcher.fetch(f"s3://{arn}/key", [(5, 70_000)])[0]) == DATA[5:70_000]
        assert S3Client(s3client_config=config).get_object(arn, "key").read() == DATA
        assert service.seen[-1].headers["host"] == "my-ap-123456789012.s3.store.example"


def test_access_point_of_an_outpost_is_signed_for_its_service() -> None:
    arn = "arn:aws:s3-outposts:eu-west-3:123456789012:outpost/op-01234567890123456/accesspoint/my-ap"
    client = S3Client()
    signed = client.sign_headers(arn, "key")
    host = "my-ap-123456789012.op-01234567890123456.s3-outposts.eu-west-3.amazonaws.com"
    assert signed.url == f"https://{host}/key"
    assert "/eu-west-3/s3-outposts/aws4_request" in dict(signed.headers)["Authorization"]
    assert client.presign(arn, "key").url.startswith(f"https://{host}/key?")


@pytest.mark.parametrize("signing", ["auto", "query", "headers"])
def test_directory_bucket_is_read_with_the_credentials_of_its_session(serve: Serve, signing: Any) -> None:
    bucket, session = "models--use1-az4--x-s3", {"AKIAOFTHESESSION0000": "secret/of/the+session"}

    def hook(call: Call) -> Answer | None:
        if "session" in call.query:
            wrong = signature_mistake(call, {ACCESS_KEY: SECRET_KEY})
            [(key, secret)] = session.items()
            names = {"SessionToken": "the/token+=", "SecretAccessKey": secret, "AccessKeyId": key}
            fields = "".join(f"<{name}>{value}</{name}>" for name, value in names.items())
            expiry = "<Expiration>2999-01-01T00:00:00Z</Expiration>"
            body = f"<CreateSessionResult><Credentials>{fields}{expiry}</Credentials></CreateSessionResult>".encode()
            return error(403, "Wrong", wrong) if wrong else Answer(200, [("Content-Length", str(len(body)))], body)
        token = call.query.get("X-Amz-S3session-Token", call.headers.get("x-amz-s3session-token"))
        wrong = signature_mistake(call, session) if token == "the/token+=" else "another token"
        if wrong or (signing == "auto" and call.is_presigned):
            return error(403, "AccessDenied", wrong or "no presigned URLs here")
        return None

    service = serve(hook)
    service.credentials = None  # checked above
    service.objects = {f"/{bucket}/a b/ü//c": DATA}
    with _fetcher(_settings(service, signing=signing)) as fetcher:
        assert bytes(fetcher.fetch_object(f"s3://{bucket}/a b/ü//c")) == DATA
    assert _kinds(service)[-1] == ("query" if signing == "query" else "headers")
    assert len([call for call in service.seen if "session" in call.query]) == 1, "the session serves all requests"


def test_refusal_of_both_kinds_has_the_stores_own_reason(serve: Serve) -> None:
    def hook(call: Call) -> Answer | None:
        return error(403, "AccessDenied", "the vault is shut") if call.method == "GET" else None

    service = serve(hook)
    with _fetcher(_settings(service)) as fetcher, pytest.raises(AccessDenied, match="the vault is shut") as raised:
        fetcher.fetch("s3://bucket/key", [(5, 100)])
    assert (raised.value.bucket, raised.value.key, raised.value.range) == ("bucket", "key", (5, 100))
    assert _kinds(service) == ["query", "query", "headers"], "the second time without If-Match"


def test_refusal_is_asked_about_once_for_all_parts(serve: Serve) -> None:
    def hook(call: Call) -> Answer | None:
        if call.method == "GET" and "-0" not in call.headers.get("range", ""):  # boto3's own asks for the first byte
            return error(403, "AccessDenied", "not for you")
        return None

    service = serve(hook)
    with _fetcher(_settings(service)) as fetcher, pytest.raises(AccessDenied, match="not for you"):
        fetcher.fetch_object("s3://bucket/key")
    assert sum(call.headers.get("range") == "bytes=0-0" for call in service.calls("GET")) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
def test_presigned_urls_may_be_refused_with_any_status(serve: Serve, status: int) -> None:
    service = serve(lambda call: error(status, "Refused") if call.is_presigned else None)
    with _fetcher(_settings(service)) as fetcher:
        assert bytes(fetcher.fetch_object("s3://bucket/key")) == DATA


@pytest.mark.parametrize(("status", "code"), [(403, "RequestExpired"), (400, "ExpiredToken"), (403, "AccessDenied")])
def test_presigned_urls_may_be_refused_as_expired(serve: Serve, status: int, code: str) -> None:
    service = serve(lambda call: error(status, code, "Request has expired") if call.is_presigned else None)
    with _fetcher(_settings(service)) as fetcher:
        assert bytes(fetcher.fetch_object("s3://bucket/key")) == DATA


def test_signing_in_the_query_only_says_what_to_set(serve: Serve) -> None:
    service = serve()
    with (
        _fetcher(_settings(service, signing="query")) as fetcher,
        pytest.raises(AccessDenied, match=r'no presigned URLs here.*signing="auto"'),
    ):
        fetcher.fetch("s3://bucket/key", [(5, 100)])
    assert _kinds(service) == ["query", "query", "headers"], "the second time without If-Match"


def test_requests_without_credentials_stay_so(serve: Serve) -> None:
    service = serve(
        lambda call: (
            error(403, "AccessDenied", "who are you?")
            if call.method == "GET"
            else Answer(200, [("Content-Length", "9"), ("ETag", '"a"')])
        )
    )
    with (
        _fetcher(_settings(service, unsigned=True, signing="headers")) as fetcher,
        pytest.raises(AccessDenied, match=r"who are you\?"),
    ):
        fetcher.fetch("s3://bucket/key", [(0, 9)])
    assert set(_kinds(service)) == {"none"}


def test_signature_that_is_too_old_is_made_anew(serve: Serve) -> None:
    refused: list[str] = []

    def hook(call: Call) -> Answer | None:
        if call.method == "GET" and not refused:
            refused.append(call.headers["authorization"])
            return error(403, "RequestTimeTooSkewed", "The difference between the request time and now is too large")
        return None

    service = serve(hook)
    with _fetcher(_settings(service, signing="headers")) as fetcher:
        assert bytes(fetcher.fetch("s3://bucket/key", [(5, 100)])[0]) == DATA[5:100]
    assert len(refused) == 1


def test_every_way_of_reading_finds_the_other_route(serve: Serve) -> None:
    service = serve()
    config = _settings(service)
    with _fetcher(config) as fetcher:
        assert (
            b"".join(bytes(view) for _, view in fetcher.stream("s3://bucket/key", [(0, PART), (PART, 2 * PART)]))
            == (DATA[: 2 * PART])
        )
    shared_session(config)._header_buckets.clear()
    files = fsspec.filesystem("mpreader", skip_instance_cache=True, s3client_config=config)
    assert files.cat_file("bucket/key") == DATA
    assert "query" in _kinds(service)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_is_loaded_by_the_other_route(serve: Serve, tmp_path: Path) -> None:
    save({"weight": torch.arange(1000), "step": 5}, storage_writer=FileSystemWriter(tmp_path))
    service = serve(**{f"run/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    state = load_checkpoint("s3://bucket/run", s3client_config=_settings(service), progress=False)
    assert state["weight"].tolist() == list(range(1000))
    command = [sys.executable, "-m", "mpreader", "load", "s3://bucket/run", "--endpoint-url", service.url]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert {"query", "headers"} <= set(_kinds(service))


def test_no_secret_leaves_with_a_signature(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "mpreader")
    service = serve(
        lambda call: error(403, "AccessDenied", "no") if call.path.endswith("no") else refuse_presigned(call)
    )
    service.objects["/bucket/no"] = DATA
    signed = S3Client(s3client_config=_settings(service)).sign_headers("bucket", "key")
    assert SECRET_KEY not in f"{signed!r} {signed.url} {signed.headers}"
    assert "Signature" not in repr(signed)
    assert "?" not in signed.url
    with _fetcher(_settings(service)) as fetcher:
        assert bytes(fetcher.fetch_object("s3://bucket/key")) == DATA
        with pytest.raises(AccessDenied) as raised:
            fetcher.fetch("s3://bucket/no", [(0, 5)])
    signatures = {re.search("Signature=([0-9a-f]{64})", f"{call.headers} {call.target}") for call in service.seen}
    told = f"{caplog.text} {raised.value!r} {''.join(traceback.format_exception(raised.value))}"
    for match in signatures:
        assert match is not None
        assert match[1] not in told


@pytest.mark.parametrize(
    ("signing", "status", "said"),
    [
        ("auto", "ok", "by signatures in headers: presigned URLs are refused"),
        ("headers", "ok", ""),
        ("query", "fail", ""),
    ],
)
def test_doctor_tries_what_the_workers_do(serve: Serve, signing: Any, status: str, said: str) -> None:
    service = serve()
    [finding] = [
        found
        for found in examine_access("s3://bucket/k", _settings(service, signing=signing))
        if found.name == "bucket"
    ]
    assert finding.status == status, finding
    assert said in finding.value
    assert "may be read" in finding.value or "--signing auto" in str(finding.remedy)


def test_doctor_says_if_only_boto3_may_read(serve: Serve) -> None:
    def hook(call: Call) -> Answer | None:
        is_boto3 = "Boto3" in call.headers.get("user-agent", "")
        return None if is_boto3 or call.method == "HEAD" else error(403, "AccessDenied", "a strange agent")

    service = serve(hook)
    [finding] = [found for found in examine_access("s3://bucket/key", _settings(service)) if found.name == "bucket"]
    assert finding.status == "fail"
    assert "a strange agent" in str(finding.problem)


def test_command_reads_by_the_other_route(serve: Serve) -> None:
    service = serve()
    command = [sys.executable, "-m", "mpreader", "fetch", "s3://bucket/key", "-o", "-", "--endpoint-url", service.url]
    for signing in ("auto", "headers"):
        done = subprocess.run([*command, "--signing", signing], capture_output=True, check=True)
        assert done.stdout == DATA
    done = subprocess.run([*command, "--signing", "query"], capture_output=True, check=False)
    assert done.returncode == 4
    assert b"Traceback" not in done.stderr


# -- http(s)


def _location(url: str) -> Answer:
    return Answer(302, [("Location", url), ("Content-Length", "0")])


def test_redirect_of_gets_alone_is_followed(serve: Serve) -> None:
    far = serve(lambda _: None, key=DATA)
    far.credentials = None
    near = serve(lambda call: _location(f"{far.url}/bucket/key?signed=1") if call.method == "GET" else None)
    near.credentials = None
    url = near.url.replace("http://", "http://user:secret@")
    with _fetcher(S3ClientConfig(max_attempts=2)) as fetcher:
        assert bytes(fetcher.fetch_object(f"{url}/bucket/key")) == DATA
    assert near.calls("HEAD")[0].headers["authorization"] == "Basic " + base64.b64encode(b"user:secret").decode()
    assert all("authorization" not in call.headers and "cookie" not in call.headers for call in far.seen)
    assert far.calls("GET")[-1].query == {"signed": "1"}


def test_redirect_of_gets_on_the_same_server_keeps_the_password(serve: Serve) -> None:
    def hook(call: Call) -> Answer | None:
        if call.headers.get("authorization") is None:
            return Answer(401, [("Content-Length", "0")])
        return _location("/bucket/there") if call.method == "GET" and call.path == "/bucket/key" else None

    service = serve(hook, key=DATA, there=DATA)
    service.credentials = None
    with _fetcher(S3ClientConfig(max_attempts=2)) as fetcher:
        url = service.url.replace("http://", "http://user:secret@")
        assert bytes(fetcher.fetch_object(f"{url}/bucket/key")) == DATA


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://host/x",
        "http://[::1",
        "http://",
        "//",
        "/bucket/key",
        "javascript:1",
        "\x7f\xff",
        "",
        None,
    ],
)
def test_redirect_of_gets_that_leads_nowhere_is_an_error_of_ours(serve: Serve, location: str | None) -> None:
    headers = [("Content-Length", "0")] + ([("Location", location)] if location is not None else [])
    service = serve(lambda call: Answer(307, headers) if call.method == "GET" else None)
    service.credentials = None
    with _fetcher(S3ClientConfig(max_attempts=2)) as fetcher, pytest.raises(TransportError) as raised:
        fetcher.fetch(f"{service.url}/bucket/key?secret=1", [(0, 5)])
    assert "secret" not in str(raised.value)
    assert "internal" not in str(raised.value)
    assert len(service.calls("GET")) < 15


def test_object_that_lies_elsewhere_in_another_version_is_not_mixed(serve: Serve) -> None:
    far = serve(lambda _: None, key=DATA[::-1])
    far.credentials = None
    near = serve(lambda call: _location(f"{far.url}/bucket/key") if call.method == "GET" else None)
    near.credentials = None
    with _fetcher(S3ClientConfig(max_attempts=2)) as fetcher, pytest.raises(MpreaderError, match="ETag"):
        fetcher.fetch(f"{near.url}/bucket/key", [(0, 5)])
