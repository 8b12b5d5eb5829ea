"""Redaction: what may be a secret is gone, what helps is left."""

from __future__ import annotations

import pytest

from mpreader.s3.redaction import redacted

_KEY = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY12"


@pytest.mark.parametrize(
    "text",
    [
        f'{{"Version": 1, "AccessKeyId": "AKIA0123456789ABCDEF", "SecretAccessKey": "{_KEY}"}}',
        f"<SecretAccessKey>{_KEY}</SecretAccessKey><SessionToken>short</SessionToken>",
        f"SecretAccessKey: '{_KEY}'",
        f"token={_KEY}",
        f"no access for {_KEY} here",
        f"AWS4-HMAC-SHA256 Credential=AKIA0123456789ABCDEF/20260101/us-east-1/s3/aws4_request, Signature={'0a' * 32}",
        f"GET https://host/bucket/key?X-Amz-Signature={'0a' * 32}&X-Amz-Security-Token=short",
        "cannot reach http://user:hunter22@proxy:3128/",
        "password=hunter22",
    ],
)
def test_redacted_text_has_no_secret(text: str) -> None:
    shown = redacted(text)
    for secret in (_KEY, "AKIA0123456789ABCDEF", "0a" * 32, "hunter22", ">short", "=short"):
        assert secret not in shown, shown


@pytest.mark.parametrize(
    "text",
    [
        "[Errno 2] No such file or directory: '/var/run/secrets/eks.amazonaws.com/serviceaccount/token'",
        "Expecting value: line 1 column 1 (char 0)",
        "The config profile (research-2) could not be found",
        'Could not connect to the endpoint URL: "https://bucket.s3.eu-west-1.amazonaws.com/run/.metadata"',
        "Error loading SSO Token: Token for https://my.awsapps.com/start does not exist",
    ],
)
def test_redacted_text_says_what_is_wrong_as_before(text: str) -> None:
    assert redacted(text) == text


def test_redacted_text_is_one_bounded_line() -> None:
    shown = redacted("a\r\nb\0c \x1b[31m" + "d " * 100_000)
    assert shown.startswith("a b c [31md d")
    assert len(shown) <= 401


def test_redacted_text_lacks_the_secrets_that_are_known() -> None:
    assert redacted("no test1234 found", ["test1234"]) == "no … found"


@pytest.mark.parametrize("text", ["x", "X1", "_", "a0", "password", "a://", "token="])
@pytest.mark.timeout(60)
def test_text_of_any_length_is_redacted(text: str) -> None:
    # Where the time grew with the square of the length, this would take hours.
    assert len(redacted(text * 10_000_000)) <= 401
