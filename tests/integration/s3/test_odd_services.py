"""Services that refuse HEAD, redirect, or answer in ways of their own: read all the same, or an error that says why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AccessDenied,
    MpreaderError,
    ObjectMissing,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ClientConfig,
    S3ReaderConstructor,
    TransportError,
)
from mpreader.cli.main import main
from mpreader.dcp import S3FileSystem, load_checkpoint
from tests.integration.service import Answer, Call, Hook, Service, error, set_environment

DATA = bytes(range(256)) * 1024
_POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=4 << 20, part_size=64 << 10)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, AWS_ACCESS_KEY_ID="AKIAKEY", AWS_SECRET_ACCESS_KEY="secret")


@pytest.fixture
def service() -> Iterator[Service]:
    with Service({"/bucket/key": DATA, "/bucket/empty": b"", "/bucket/one": b"1"}) as service:
        yield service


def _settings(service: Service, **settings: Any) -> S3ClientConfig:
    return S3ClientConfig(endpoint_url=service.url, force_path_style=True, max_attempts=2, **settings)


def _heads(answer: Answer) -> Hook:
    return lambda call: answer if call.method == "HEAD" else None


_NO_HEAD: dict[str, Hook] = {
    **{
        str(status): _heads(Answer(status, [("Content-Length", "0")])) for status in (204, 300, 304, 308, 400, 401, 403)
    },
    **{str(status): _heads(Answer(status, [("Content-Length", "0")])) for status in (404, 405, 410, 411, 418, 501)},
    "301": _heads(Answer(301, [("Location", "https://127.0.0.1:1/"), ("Content-Length", "0")])),
    "302": _heads(Answer(302, [("Location", "/login"), ("Content-Length", "0")])),
    "no length": _heads(Answer(200, [("ETag", '"a"')])),
    "bad length": lambda call: b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" if call.method == "HEAD" else None,
    "bad date": _heads(Answer(200, [("Content-Length", "5"), ("Last-Modified", "yesterday")])),
}


def _reader_of(kind: str) -> Callable[[S3ClientConfig], bytes]:
    def read(config: S3ClientConfig) -> bytes:
        constructor = getattr(S3ReaderConstructor, kind)()
        with S3Client(s3client_config=config).get_object("bucket", "key", reader_constructor=constructor) as reader:
            reader.seek(-5, os.SEEK_END)
            tail = bytes(reader.read())
            reader.seek(0)
            return bytes(reader.read()[:-5]) + tail

    return read


def _fetch(config: S3ClientConfig) -> bytes:
    with RangeFetcher(config, _POOL) as fetcher:
        assert [bytes(view) for view in fetcher.fetch("s3://bucket/key", [(0, 5), (-5, None)])] == [DATA[:5], DATA[-5:]]
        assert bytes(fetcher.fetch_object("s3://bucket/empty")) == b""
        assert bytes(fetcher.fetch_object("s3://bucket/one")) == b"1"
        return bytes(fetcher.fetch_object("s3://bucket/key"))


def _stream(config: S3ClientConfig) -> bytes:
    with RangeFetcher(config, _POOL) as fetcher:
        ranges = [(0, 100_000), (100_000, len(DATA))]
        return b"".join(bytes(view) for _, view in fetcher.stream("s3://bucket/key", ranges))


def _fsspec(config: S3ClientConfig) -> bytes:
    files = fsspec.filesystem("mpreader", skip_instance_cache=True, s3client_config=config)
    assert files.info("bucket/key")["size"] == len(DATA)
    assert files.exists("bucket/key")
    with files.open("bucket/key") as file:
        assert file.read(5) == DATA[:5]
    return bytes(files.cat_file("bucket/key"))


def _exists(config: S3ClientConfig) -> bytes:
    assert S3FileSystem(s3client_config=config).exists("s3://bucket/key")
    return DATA


def _command(config: S3ClientConfig) -> bytes:
    path = Path(os.environ["TMPDIR"]) / "file"
    with pytest.raises(SystemExit) as ended:
        main(["fetch", "s3://bucket/key", "-o", str(path), "--endpoint-url", str(config.endpoint_url)])
    assert ended.value.code == 0
    return path.read_bytes()


_READS: dict[str, Callable[[S3ClientConfig], bytes]] = {
    "fetch": _fetch,
    "stream": _stream,
    "fsspec": _fsspec,
    "exists": _exists,
    "command": _command,
    **{kind: _reader_of(kind) for kind in ("sequential", "range_based")},
}


@pytest.mark.parametrize("refusal", _NO_HEAD)
@pytest.mark.parametrize("read", ["fetch", "fsspec", "exists"])
def test_object_is_read_though_head_is_refused(service: Service, refusal: str, read: str) -> None:
    service.hook = _NO_HEAD[refusal]
    assert _READS[read](_settings(service)) == DATA


@pytest.mark.parametrize("read", _READS)
def test_every_way_of_reading_does_without_head(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    service.hook = _NO_HEAD["403"]
    assert _READS[read](_settings(service)) == DATA


def test_client_does_without_head(service: Service) -> None:
    service.hook = _NO_HEAD["405"]
    client = S3Client(s3client_config=_settings(service))
    assert client.head_object("bucket", "empty").size == 0
    usual = client.head_object("bucket", "key")
    service.hook = lambda _: None
    assert client.head_object("bucket", "key") == usual
    service.hook = _NO_HEAD["405"]
    assert client.checksums("bucket", "key").by_algorithm.keys() == {"md5"}


def test_copy_does_without_head(service: Service) -> None:
    copied: list[str] = []

    def hook(call: Call) -> Answer | bytes | None:
        if call.method == "PUT":
            copied.append(call.headers["x-amz-copy-source"])
            body = b"<CopyObjectResult><ETag>&quot;a&quot;</ETag></CopyObjectResult>"
            return Answer(200, [("Content-Length", str(len(body)))], body)
        return _NO_HEAD["403"](call)

    service.hook = hook
    S3Client(s3client_config=_settings(service)).copy_object("bucket", "key", "bucket", "copy")
    assert copied == ["bucket/key"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_is_loaded_without_head(service: Service, tmp_path: Path) -> None:
    save({"weight": torch.arange(1000)}, storage_writer=FileSystemWriter(tmp_path))
    service.objects.update({f"/bucket/run/{path.name}": path.read_bytes() for path in tmp_path.iterdir()})
    service.hook = _NO_HEAD["403"]
    state = load_checkpoint("s3://bucket/run", s3client_config=_settings(service), pool_config=_POOL, progress=False)
    assert state["weight"].tolist() == list(range(1000))


def test_object_that_neither_may_be_read_is_refused_for_the_reason_of_the_get(service: Service) -> None:
    service.hook = lambda call: error(403, "AccessDenied", "by policy")
    with pytest.raises(AccessDenied, match="by policy"):
        S3Client(s3client_config=_settings(service)).head_object("bucket", "key")
    service.hook = lambda _: None
    with pytest.raises(ObjectMissing):
        S3Client(s3client_config=_settings(service)).head_object("bucket", "nothing")


def test_size_that_nobody_tells_is_an_error(service: Service) -> None:
    body = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/*\r\nContent-Length: 1\r\n\r\n1"
    service.hook = lambda call: body if call.method == "GET" else Answer(200)
    with pytest.raises(TransportError, match="does not tell the object's size"):
        S3Client(s3client_config=_settings(service)).head_object("bucket", "key")


# -- redirects

_USES: dict[str, Callable[[S3ClientConfig], Any]] = {
    **_READS,
    "list": lambda config: next(S3Client(s3client_config=config).list_objects("bucket")),
    "write": lambda config: S3Client(s3client_config=config).put_object("bucket", "new").close(),
    "load": lambda config: load_checkpoint("s3://bucket/run", s3client_config=config, progress=False),
}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "said"),
    [
        (
            "https://store.example/bucket/key?X-Amz-Signature=abcdef0123456789",
            r"https://store\.example: .*endpoint_url",
        ),
        (
            "http://user:secret@node-7.store.example:9000/bucket/key",
            r"http://node-7\.store\.example:9000: .*endpoint_url",
        ),
        (None, "names none: check endpoint_url"),
        ("", "names none: check endpoint_url"),
        ("/bucket/key", "names none: check endpoint_url"),
    ],
)
def test_redirect_says_where_the_service_points_to(
    service: Service, status: int, location: str | None, said: str
) -> None:
    headers = [("Content-Length", "0")] + ([] if location is None else [("Location", location)])
    service.hook = lambda call: Answer(status, headers)
    for use in ("fetch", "list", "write", "load", "sequential"):
        with pytest.raises(TransportError, match=said) as raised:
            _USES[use](_settings(service))
        assert "secret" not in str(raised.value)
        assert "Signature" not in str(raised.value)


def test_redirect_of_the_workers_alone_says_where_it_leads(service: Service) -> None:
    answer = Answer(307, [("Location", "http://node-7.store.example/x"), ("Content-Length", "0")])
    service.hook = lambda call: answer if call.method == "GET" else None
    with pytest.raises(TransportError, match=r"http://node-7\.store\.example: .*endpoint_url"):
        _fetch(_settings(service))


def test_redirect_in_a_circle_of_regions_ends(service: Service) -> None:
    regions = iter(f"eu-west-{number}" for number in range(1000))

    def hook(call: Call) -> Answer:
        headers = [("x-amz-bucket-region", next(regions)), ("Content-Length", "0")]
        return Answer(301, headers)

    service.hook = hook
    for use in ("fetch", "list", "write"):
        with pytest.raises(TransportError, match="region"):
            _USES[use](_settings(service))
    assert len(service.seen) < 30


# -- answers that are none


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>Please log in</body></html>",
        b"<?xml version='1.0'?><Other/>",
        b"Please log in",
        b"{}",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>maybe</IsTruncated><Contents><Key/></Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Size>5</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>k</Key><Size>much</Size></Contents></ListBucketResult>",
        b"<ListBucketResult><Contents><Key>k</Key></Contents></ListBucketResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>a</NextContinuationToken>"
        b"</ListBucketResult>",
        b"<!DOCTYPE a [<!ENTITY b 'c'>]><ListBucketResult>&b;&d;</ListBucketResult>",
    ],
)
def test_listing_that_is_none_is_no_empty_listing(service: Service, body: bytes) -> None:
    service.hook = lambda call: Answer(200, [("Content-Length", str(len(body)))], body)
    config = _settings(service)
    with pytest.raises(TransportError):
        list(S3Client(s3client_config=config).list_objects("bucket"))
    with pytest.raises(MpreaderError):
        S3FileSystem(s3client_config=config).ls("s3://bucket/run")
    with pytest.raises(MpreaderError):
        fsspec.filesystem("mpreader", skip_instance_cache=True, s3client_config=config).ls("bucket/run")


@pytest.mark.parametrize(
    "answer", [b"<html/>", b"", b"<InitiateMultipartUploadResult><UploadId/></InitiateMultipartUploadResult>"]
)
def test_upload_that_the_service_does_not_name_is_an_error(service: Service, answer: bytes) -> None:
    service.hook = lambda call: Answer(200, [("Content-Length", str(len(answer)))], answer)
    writer = S3Client(s3client_config=_settings(service, part_size=5 << 20)).put_object("bucket", "new")
    with pytest.raises(TransportError):
        writer.write(bytes(11 << 20))


def test_error_without_code_or_message_does_not_say_none(service: Service) -> None:
    for body in (
        b"<Error><Code>NoSuchKey</Code><Message></Message></Error>",
        b"<Error><Code></Code><Message/></Error>",
        b"<Error/>",
        b"",
    ):
        for status in (403, 404, 400, 409):
            answer = Answer(status, [("Content-Length", str(len(body)))], body)
            service.hook = lambda call, answer=answer: answer  # type: ignore[misc]
            for use in ("fetch", "list", "write", "sequential"):
                with pytest.raises(MpreaderError) as raised:
                    _USES[use](_settings(service))
                assert "None" not in str(raised.value)


_NO_HTTP = {
    "bare LF": b"HTTP/1.1 206 P\nContent-Length: 5\nContent-Range: bytes 0-4/262144\n\n12345",
    "endless header": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 300_000,
    "garbage": b"garbage\r\n\r\n",
    "HTTP/0.9": b"<html>hello",
    "no colon": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
}


@pytest.mark.parametrize("raw", _NO_HTTP)
@pytest.mark.parametrize("which", ["GET", "all"])
def test_answer_that_is_no_http_is_an_error_at_once(service: Service, raw: str, which: str) -> None:
    service.hook = lambda call: _NO_HTTP[raw] if which in ("all", call.method) else None
    config = S3ClientConfig(endpoint_url=service.url, force_path_style=True)  # with ten attempts
    for source in ("s3://bucket/key", f"{service.url}/bucket/key"):
        with RangeFetcher(config, _POOL) as fetcher, pytest.raises(TransportError):
            fetcher.fetch(source, [(0, 5)])
    if which == "all" and raw not in ("bare LF", "no colon"):  # which Python's own client takes for HTTP
        with pytest.raises(TransportError, match="no HTTP"):
            S3Client(s3client_config=config).head_object("bucket", "key")
    assert len(service.seen) < 15, "a few attempts, and not ten each"
