"""parse_s3_uri: keys are taken as they stand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader import ConfigError
from mpreader.s3 import parse_s3_uri


@given(st.from_regex(r"[a-z0-9][a-z0-9.-]{2,30}", fullmatch=True), st.text())
def test_parse_s3_uri_takes_the_key_literally(bucket: str, key: str) -> None:
    assert parse_s3_uri(f"s3://{bucket}/{key}") == (bucket, key)


def test_parse_s3_uri_without_key_names_the_bucket() -> None:
    assert parse_s3_uri("s3://bucket") == parse_s3_uri("s3://bucket/") == ("bucket", "")


@pytest.mark.parametrize("uri", ["", "bucket/key", "https://bucket/key", "S3://bucket/key", "s3:/bucket/key"])
def test_parse_s3_uri_refuses_other_schemes(uri: str) -> None:
    with pytest.raises(ConfigError, match="not an S3 URI"):
        parse_s3_uri(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key"])
def test_parse_s3_uri_refuses_a_missing_bucket(uri: str) -> None:
    with pytest.raises(ConfigError, match="no bucket"):
        parse_s3_uri(uri)
