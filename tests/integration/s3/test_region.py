"""A bucket of another region, against a server that refuses signatures as S3 does (moto takes them all)."""

from __future__ import annotations

import hashlib
import http.client
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote

import pytest

from mpreader import AccessDenied, PoolConfig, RangeFetcher, S3Client, S3ClientConfig, TransportError
from mpreader.dcp import load_checkpoint
from mpreader.sources.s3 import S3Source
from tests.integration.service import Answer, Call, Service, error

_HOME = "eu-west-1"
_DATA = b"in another region"


class _Region(Service):
    """A few objects, for signatures of their region alone; the path says in which way the others are refused."""

    def usual(self, call: Call) -> Answer:
        if "nowhere" in call.path:
            return error(301, "PermanentRedirect")
        if "denied" in call.path:
            return error(403, "ExpiredToken" if "expired" in call.path else "AccessDenied")
        if "payer" in call.path and call.headers.get("x-amz-request-payer") != "requester":
            return error(403, "AccessDenied")
        if _region_of(call) == _HOME:
            return super().usual(call)
        hint = [] if "unhelpful" in call.path else [("x-amz-bucket-region", _HOME)]
        if "moved" in call.path:
            return error(301, "PermanentRedirect", "said the service", *hint)
        return error(400, "AuthorizationHeaderMalformed", f"expecting '{_HOME}'", *hint)


def _region_of(call: Call) -> str:
    signature = unquote(call.headers.get("authorization", call.target))
    scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", signature)
    return scope[1] if scope else ""


@pytest.fixture
def server() -> Iterator[_Region]:
    with _Region({f"/bucket/{key}": _DATA for key in ("key", "moved", "payer")}) as server:
        yield server


@pytest.fixture
def client(server: _Region, aws_environment: None) -> Iterator[S3Client]:
    client = S3Client("us-east-1", endpoint=server.url, s3client_config=S3ClientConfig(max_attempts=2))
    yield client
    client.close()


@pytest.mark.parametrize("key", ["key", "moved"])
@pytest.mark.row("403, 404, wrong region")
def test_source_follows_the_bucket_and_signs_routes_for_its_region(client: S3Client, server: _Region, key: str) -> None:
    source = S3Source(client, "bucket", key)
    assert source.open()[:2] == (len(_DATA), f'"{hashlib.md5(_DATA).hexdigest()}"')
    assert (server.seen[0].method, _region_of(server.seen[0])) == ("HEAD", "us-east-1")

    route = source.route()
    connection = http.client.HTTPConnection(route.host, route.port, timeout=10)
    connection.request("GET", route.target, headers=dict(route.headers))
    assert connection.getresponse().read() == _DATA
    connection.close()

    del server.seen[:]
    client.head_object("bucket", key)
    assert [(call.method, _region_of(call)) for call in server.seen] == [
        ("HEAD", _HOME)
    ]  # what was found out once is known


def test_reader_follows_the_bucket(client: S3Client) -> None:
    assert client.get_object("bucket", "moved").read() == _DATA


@pytest.mark.row("403, 404, wrong region")
def test_source_that_can_not_follow_says_which_setting_to_change(client: S3Client) -> None:
    with pytest.raises(TransportError, match=r"another region.*region=.*\[region us-east-1, endpoint http://127"):
        S3Source(client, "unhelpful", "moved").open()


def _fetch(client: S3Client, bucket: str) -> object:
    with RangeFetcher(client.s3client_config, PoolConfig(workers=1)) as fetcher:
        return fetcher.fetch(f"s3://{bucket}/key", [(0, 1)])


@pytest.mark.parametrize("bucket", ["nowhere", "nowhere--use1-az4--x-s3"], ids=["bucket", "directory-bucket"])
@pytest.mark.parametrize(
    "use",
    [
        lambda client, bucket: client.head_object(bucket, "key"),
        lambda client, bucket: next(client.list_objects(bucket)),
        lambda client, bucket: client.call("head_bucket", bucket),
        lambda client, bucket: client.get_object(bucket, "key").read(),
        lambda client, bucket: client.put_object(bucket, "key").close(),
        lambda client, bucket: client.copy_object("bucket", "key", bucket, "key"),
        _fetch,
        lambda client, bucket: load_checkpoint(f"s3://{bucket}/run", s3client_config=client.s3client_config),
    ],
    ids=["head", "list", "head-bucket", "read", "write", "copy", "fetch", "load"],
)
def test_redirect_that_names_no_region_is_an_error_that_says_what_to_check(
    client: S3Client, server: _Region, use: Callable[[S3Client, str], object], bucket: str
) -> None:
    with pytest.raises(TransportError, match=r"redirects the request.*check endpoint_url.*region=.*HTTP 301"):
        use(client, bucket)
    assert len(server.seen) < 10


@pytest.mark.parametrize(("key", "said"), [("denied", "AccessDenied"), ("denied-expired", "ExpiredToken")])
def test_refused_head_tells_the_reason_that_only_a_get_is_given(client: S3Client, key: str, said: str) -> None:
    with pytest.raises(AccessDenied, match=f"HTTP 403 {said}: said the service"):
        S3Source(client, "bucket", key).open()


def test_requester_pays_is_said_in_every_request(client: S3Client, server: _Region) -> None:
    with pytest.raises(AccessDenied, match="requester_pays=True"):
        client.head_object("bucket", "payer")
    config = S3ClientConfig(region=_HOME, endpoint_url=server.url, requester_pays=True)
    paying = S3Client(s3client_config=config)
    assert paying.head_object("bucket", "payer").size == len(_DATA)
    assert paying.get_object("bucket", "payer").read() == _DATA
    paying.close()
