"""The embedded S3 is S3 as far as mpreader needs it, fast at ranges, and ends with its owner."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import select
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config

from mpreader.testing import S3Request, S3Server

DATA = random.Random(1).randbytes(6_000_000)  # more than moto keeps in memory


@contextlib.contextmanager
def client_of(server: S3Server) -> Iterator[Any]:
    environment = server.environment()
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        verify=environment.get("AWS_CA_BUNDLE"),
        config=Config(signature_version="s3v4", retries={"total_max_attempts": 1}),
    )
    with contextlib.closing(client):
        yield client


@pytest.fixture
def client(s3_server: S3Server) -> Iterator[Any]:
    with client_of(s3_server) as client:
        yield client


def read(client: Any, bucket: str, key: str, **arguments: str) -> bytes:
    with client.get_object(Bucket=bucket, Key=key, **arguments)["Body"] as body:
        content: bytes = body.read()
    return content


def refusal(client: Any, bucket: str, key: str, **arguments: str) -> tuple[int, str]:
    with pytest.raises(botocore.exceptions.ClientError) as caught:
        client.get_object(Bucket=bucket, Key=key, **arguments)
    answer: Any = caught.value.response
    return answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]


@pytest.mark.parametrize("key", ["small", "folder/a key+ü%20"])
def test_ranges_are_the_objects_bytes(client: Any, bucket: str, key: str) -> None:
    data = DATA if key != "small" else DATA[:100]
    etag = client.put_object(Bucket=bucket, Key=key, Body=data)["ETag"]
    size = len(data)
    for asked, start, end in (("0-0", 0, 1), ("9-", 9, size), ("-7", size - 7, size), ("50-99999999", 50, size)):
        answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={asked}", IfMatch=etag)
        with answer["Body"] as body:
            assert body.read() == data[start:end]
        assert answer["ContentRange"] == f"bytes {start}-{end - 1}/{size}"
        assert (answer["ETag"], answer["ContentLength"]) == (etag, end - start)
    for ignored in ("bytes=9-5", "bytes=0-1,5-6"):
        assert read(client, bucket, key, Range=ignored) == data
    assert read(client, bucket, key) == data


def test_ranges_have_the_headers_that_were_stored(client: Any, bucket: str) -> None:
    stored = {"ContentEncoding": "gzip", "ContentType": "text/x", "CacheControl": "no-store", "Metadata": {"a": "b"}}
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    version = client.put_object(Bucket=bucket, Key="key", Body=b"0123456789", **stored)["VersionId"]
    for arguments in ({}, {"Range": "bytes=2-5"}, {"Range": "bytes=0-9"}):
        answer = client.get_object(Bucket=bucket, Key="key", **arguments)
        answer["Body"].close()
        assert {name: answer[name] for name in stored} == stored
        assert answer["VersionId"] == version
        names = [name.lower() for name in answer["ResponseMetadata"]["HTTPHeaders"]]
        assert len(names) == len(set(names))


def test_ranges_follow_an_overwrite(client: Any, bucket: str) -> None:
    first = client.put_object(Bucket=bucket, Key="key", Body=DATA)["ETag"]
    assert read(client, bucket, "key", Range="bytes=5-8", IfMatch=first) == DATA[5:9]
    second = client.put_object(Bucket=bucket, Key="key", Body=DATA[::-1])["ETag"]
    assert second != first
    assert refusal(client, bucket, "key", Range="bytes=5-8", IfMatch=first) == (412, "PreconditionFailed")
    assert read(client, bucket, "key", Range="bytes=5-8", IfMatch=second) == DATA[::-1][5:9]
    client.delete_object(Bucket=bucket, Key="key")
    assert refusal(client, bucket, "key", Range="bytes=5-8") == (404, "NoSuchKey")


def test_refusals_are_those_of_s3(client: Any, bucket: str, s3_server: S3Server) -> None:
    client.put_object(Bucket=bucket, Key="key", Body=b"0123456789")
    assert refusal(client, bucket, "key", Range="bytes=10-20") == (416, "InvalidRange")
    assert refusal(client, bucket, "other", Range="bytes=0-1") == (404, "NoSuchKey")
    assert refusal(client, "no-such-bucket", "key", Range="bytes=0-1") == (404, "NoSuchBucket")
    host = urlsplit(s3_server.endpoint_url).netloc
    with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as connection:
        connection.request("GET", f"/{bucket}/key", headers={"Range": "bytes=0-1"})
        with connection.getresponse() as response:
            assert response.status == 403  # unsigned


def test_old_versions_keep_their_ranges(client: Any, bucket: str) -> None:
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    old = client.put_object(Bucket=bucket, Key="key", Body=b"old bytes")["VersionId"]
    client.put_object(Bucket=bucket, Key="key", Body=b"new bytes")
    assert read(client, bucket, "key", Range="bytes=0-2", VersionId=old) == b"old"
    assert read(client, bucket, "key", Range="bytes=0-2") == b"new"


def test_multipart_upload_is_one_object(client: Any, bucket: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key="key")["UploadId"]
    named = {"Bucket": bucket, "Key": "key", "UploadId": upload}
    parts = [
        {"PartNumber": number, "ETag": client.upload_part(PartNumber=number, Body=body, **named)["ETag"]}
        for number, body in ((1, DATA[:5_500_000]), (2, DATA[5_500_000:]))
    ]
    client.complete_multipart_upload(MultipartUpload={"Parts": parts}, **named)
    assert read(client, bucket, "key", Range="bytes=5499990-5500009") == DATA[5_499_990:5_500_010]


def test_presigned_ranges_keep_the_connection(client: Any, bucket: str, s3_server: S3Server) -> None:
    client.put_object(Bucket=bucket, Key="key", Body=DATA)
    url = urlsplit(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "key"}))
    with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=10)) as connection:
        connection.connect()
        port = connection.sock.getsockname()[1]
        for start in (0, 5_000_000, 123):
            connection.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={start}-{start + 99}"})
            with connection.getresponse() as response:
                assert (response.status, response.read()) == (206, DATA[start : start + 100])
        connection.request(
            "HEAD", f"/{bucket}/key", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=a/b/c/s3/d"}
        )
        with connection.getresponse() as response:
            assert (response.status, response.headers["Content-Length"]) == (200, str(len(DATA)))
        assert connection.sock.getsockname()[1] == port
    assert [request for request in s3_server.requests if request.path.startswith(f"/{bucket}/")] == [
        S3Request("PUT", f"/{bucket}/key", None, 200),
        S3Request("GET", f"/{bucket}/key", "bytes=0-99", 206),
        S3Request("GET", f"/{bucket}/key", "bytes=5000000-5000099", 206),
        S3Request("GET", f"/{bucket}/key", "bytes=123-222", 206),
        S3Request("HEAD", f"/{bucket}/key", None, 200),
    ]


def test_ranges_are_whole_while_the_object_is_overwritten(client: Any, bucket: str) -> None:
    versions = [bytes([number]) * 5_200_000 for number in (1, 2)]
    client.put_object(Bucket=bucket, Key="key", Body=versions[0])
    stop = threading.Event()

    def overwrite() -> None:
        while not stop.is_set():
            for version in versions:
                client.put_object(Bucket=bucket, Key="key", Body=version)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        for _ in range(100):
            assert set(read(client, bucket, "key", Range="bytes=100-1000099")) in ({1}, {2})
    finally:
        stop.set()
        writer.join()


def test_tls_is_trusted_through_its_authority(tmp_path: Any) -> None:
    with S3Server(tls=True) as server:
        server.create_bucket("secure")
        assert server.endpoint_url.startswith("https://")
        with client_of(server) as client:
            client.put_object(Bucket="secure", Key="key", Body=DATA)
            assert read(client, "secure", "key", Range="bytes=1-5000000") == DATA[1:5_000_001]
        host = urlsplit(server.endpoint_url).netloc
        with (
            contextlib.closing(http.client.HTTPSConnection(host, timeout=10)) as stranger,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            stranger.connect()
        ca_file = server.ca_file
        assert ca_file is not None
        assert ca_file.exists()
    assert not ca_file.exists()


def test_bad_bucket_name_is_refused(s3_server: S3Server) -> None:
    with pytest.raises(HTTPError) as caught:
        s3_server.create_bucket("x")
    caught.value.close()
    assert caught.value.code == 400


def test_server_ends_with_the_process_that_started_it() -> None:
    owner = "import os, signal, mpreader.testing as t; s = t.S3Server(); s.start(); print(s._process.pid, flush=True); "
    owner += "os.kill(os.getpid(), signal.SIGKILL)"
    with subprocess.Popen([sys.executable, "-c", owner], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                ended, _, _ = select.select([handle], [], [], 10)
            finally:
                os.close(handle)
            assert ended


def test_server_that_does_not_run_has_no_url() -> None:
    server = S3Server()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.endpoint_url
    server.close()
