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


_ACCESS_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint"


@pytest.mark.parametrize(
    "arn",
    [
        f"{_ACCESS_POINT}/my-ap",
        f"{_ACCESS_POINT}:my-ap",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/my-ap",
        "arn:aws-us-gov:s3:us-gov-west-1:123456789012:accesspoint/my-ap",
        "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap",
        "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/my-lambda",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01234567890123456/accesspoint/my-ap",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01234567890123456:accesspoint:my-ap",
    ],
)
@pytest.mark.parametrize("key", ["", "key", "dir/a key:with%20+#?/", "/leading", "arn:aws:s3"])
def test_parse_s3_uri_takes_an_access_points_arn_for_the_bucket(arn: str, key: str) -> None:
    assert parse_s3_uri(f"s3://{arn}/{key}") == (arn, key)
    assert parse_s3_uri(f"s3://{arn}") == (arn, "")


@pytest.mark.parametrize(
    "arn",
    ["arn:aws:s3:::bucket/key", f"{_ACCESS_POINT}/", "arn:aws:s3:us-east-1:12:accesspoint/a/key", "arn:", "arn:x/y"],
)
def test_parse_s3_uri_refuses_other_arns(arn: str) -> None:
    with pytest.raises(ConfigError, match=r"none of an access point; write s3://arn:aws:s3:REGION"):
        parse_s3_uri(f"s3://{arn}")
