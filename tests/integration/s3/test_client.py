"""S3Client against the embedded S3."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import secrets
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpreader import AccessDenied, ConfigError, ObjectMissing, S3Client, S3ClientConfig, S3ReaderConstructor
from mpreader.errors import TransportError
from mpreader.pool.worker.route import Route
from mpreader.sources.s3 import S3Source
from mpreader.testing import FaultServer, S3Server
from tests.integration.service import ODD_KEYS

KEYS = [*ODD_KEYS, "trailing/", "?versionId=null"]


def _fetch(route: Route, start: int, end: int) -> bytes:
    """Fetch a range by a route, as a worker does, with plain http.client."""
    connection = http.client.HTTPConnection(route.host, route.port, timeout=30)
    try:
        connection.putrequest("GET", route.target, skip_host=True, skip_accept_encoding=True)
        for name, value in (*route.headers, ("Range", f"bytes={start}-{end - 1}")):
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read()
        assert response.status == 206, body
        return body
    finally:
        connection.close()


@pytest.mark.parametrize("key", KEYS)
def test_client_round_trips_any_key(bucket: str, key: str) -> None:
    data = secrets.token_bytes(1000)
    client = S3Client()
    with client.put_object(bucket, key) as writer:
        writer.write(data)
    info = client.head_object(bucket, key)
    assert (info.key, info.size, info.storage_class) == (key, 1000, "STANDARD")
    assert [info] == [entry for page in client.list_objects(bucket) for entry in page.object_info]
    assert client.get_object(bucket, key).read() == data

    source = S3Source(client, bucket, key)
    assert source.open()[:2] == (1000, info.etag)
    assert _fetch(source.route(), 10, 500) == data[10:500]

    client.copy_object(bucket, key, bucket, key + "copy")
    assert client.get_object(bucket, key + "copy").read() == data
    client.delete_object(bucket, key)
    client.delete_object(bucket, key)  # again is no error
    with pytest.raises(ObjectMissing):
        client.head_object(bucket, key)
    client.close()


def test_list_objects_pages_and_sums_up_prefixes(bucket: str) -> None:
    client = S3Client()
    for key in ("a/1", "a/2", "b 1", "c/1", "z"):
        client.put_object(bucket, key).close()
    pages = list(client.list_objects(bucket, max_keys=2))
    assert [[info.key for info in page.object_info] for page in pages] == [["a/1", "a/2"], ["b 1", "c/1"], ["z"]]
    [page] = client.list_objects(bucket, delimiter="/")
    assert page.common_prefixes == ("a/", "c/")
    assert [info.key for info in page.object_info] == ["b 1", "z"]
    [page] = client.list_objects(bucket, prefix="nothing/")
    assert (page.object_info, page.common_prefixes) == ((), ())
    client.close()


def test_get_object_serves_every_kind_of_reader(bucket: str) -> None:
    client = S3Client()
    data = secrets.token_bytes(3_000_000)
    with client.put_object(bucket, "key") as writer:
        writer.write(data)
    info = client.head_object(bucket, "key")
    for constructor in (None, S3ReaderConstructor.sequential(), S3ReaderConstructor.range_based(buffer_size=1000)):
        for known in (None, info):
            with client.get_object(bucket, "key", object_info=known, reader_constructor=constructor) as reader:
                reader.seek(-2_000_000, os.SEEK_END)
                assert reader.read(100) == data[1_000_000:1_000_100]
                reader.seek(5)
                assert reader.read() == data[5:]
    client.close()


@pytest.mark.parametrize(
    ("wrong_bucket", "said"), [(True, "there is no such bucket"), (False, "the bucket exists, but has no such key")]
)
def test_missing_tells_bucket_from_key(bucket: str, wrong_bucket: bool, said: str) -> None:
    client = S3Client()
    name = "no-such-bucket" if wrong_bucket else bucket
    calls: list[Callable[[], object]] = [
        lambda: client.head_object(name, "no/such/key"),
        lambda: client.get_object(name, "no/such/key").read(),
        lambda: client.copy_object(name, "no/such/key", bucket, "key"),
        lambda: S3Source(client, name, "no/such/key").open(),
    ]
    for call in calls:
        with pytest.raises(ObjectMissing, match=said) as caught:
            call()
        assert f"s3://{name}/no/such/key" in str(caught.value)
        assert (caught.value.bucket, caught.value.key) == (name, "no/such/key")
    client.close()


def test_copy_object_into_a_missing_bucket_names_the_destination(bucket: str) -> None:
    client = S3Client()
    client.put_object(bucket, "key").close()
    with pytest.raises(ObjectMissing, match="s3://no-such-bucket/copy: there is no such bucket"):
        client.copy_object(bucket, "key", "no-such-bucket", "copy")
    client.close()


def test_client_without_credentials_is_denied_with_guidance(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(AccessDenied, match=r"AWS_ACCESS_KEY_ID.*unsigned=True"):
        S3Client().head_object(bucket, "key")


def test_client_that_can_not_connect_names_endpoint_and_advice(aws_environment: None) -> None:
    client = S3Client(endpoint="http://127.0.0.1:1", s3client_config=S3ClientConfig(max_attempts=2))
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:1.*check endpoint_url, region, proxies") as caught:
        client.head_object("bucket", "key")
    assert caught.value.attempts == 2


@pytest.mark.row("secrets")
def test_errors_and_their_tracebacks_hold_no_secret(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"  # from AWS's documentation, opens nothing
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("HTTP_PROXY", f"http://user:{secret.replace('/', '%2F')}@127.0.0.1:1")
    client = S3Client(endpoint="http://store.invalid", s3client_config=S3ClientConfig(max_attempts=1))
    with pytest.raises(TransportError) as caught:
        client.head_object("bucket", "key")
    text = "".join(traceback.format_exception(caught.value))
    assert "MDENG" not in text
    assert "Signature" not in text


def test_client_reaches_an_endpoint_with_its_own_authority(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tls=True) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        client = S3Client()
        with client.put_object("bucket", "key") as writer:
            writer.write(b"data")
        route = S3Source(client, "bucket", "key").route()
        assert (route.tls, route.ca_file) == (True, str(server.ca_file))
        client.close()
        monkeypatch.delenv("AWS_CA_BUNDLE")
        with pytest.raises(TransportError, match="SSL"):
            S3Client(s3client_config=S3ClientConfig(max_attempts=1)).head_object("bucket", "key")


def test_client_is_shared_by_threads(bucket: str) -> None:
    client = S3Client()
    client.put_object(bucket, "key").close()
    with ThreadPoolExecutor(8) as threads:
        infos = list(threads.map(lambda _: client.head_object(bucket, "key"), range(16)))
        hosts = set(threads.map(lambda _: S3Source(client, bucket, "key").route().host, range(16)))
    assert len(set(infos)) == len(hosts) == 1
    client.close()


def test_client_connects_anew_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer({"/bucket/key": b"data"}) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        client = S3Client()
        client.head_object("bucket", "key")
        child = multiprocessing.get_context("fork").Process(target=client.head_object, args=("bucket", "key"))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        child.close()
        client.head_object("bucket", "key")
        # Parent and child must not talk on one socket; the parent goes on with its own.
        assert [request.connection for request in server.requests] == [1, 2, 1]
        client.close()


def test_client_with_a_malformed_endpoint_is_a_config_error(aws_environment: None) -> None:
    with pytest.raises(ConfigError, match="endpoint_url"):
        S3Client(endpoint="http://").head_object("bucket", "key")
