"""source_of: each URI makes the source that it names."""

from __future__ import annotations

import pytest

from mpreader import ConfigError, S3Client
from mpreader.sources.http import HttpSource
from mpreader.sources.s3 import S3Source
from mpreader.sources.uri import source_of


def _no_client() -> S3Client:
    raise AssertionError("no client is needed")


def test_source_of_an_s3_uri_is_an_object_of_the_client() -> None:
    client = S3Client()
    source = source_of("s3://bucket/a/key ?#", lambda: client, 3)
    assert isinstance(source, S3Source)
    assert (source.bucket, source.key, source.max_attempts) == ("bucket", "a/key ?#", 10)


@pytest.mark.parametrize("uri", ["http://host/key", "HTTPS://host/key"])
def test_source_of_a_url_needs_no_client(uri: str) -> None:
    source = source_of(uri, _no_client, 3)
    assert isinstance(source, HttpSource)
    assert (source.bucket, source.key, source.max_attempts) == ("host", "/key", 3)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://bucket", "names a bucket, not an object"),
        ("s3://bucket/", "names a bucket, not an object"),
        ("s3://", "no bucket"),
        ("bucket/key", "not an http"),
        ("ftp://host/key", "not an http"),
        (b"s3://bucket/key", "a source is text"),
        (None, "a source is text"),
    ],
)
def test_source_of_anything_else_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        source_of(uri, S3Client, 3)
