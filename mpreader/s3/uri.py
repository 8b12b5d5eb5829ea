"""URIs of objects in S3: ``s3://bucket/key``, or with an ARN in place of the bucket. The one parser; pure."""

from __future__ import annotations

import re
from typing import Final

from mpreader.errors import ConfigError

__all__ = ["parse_s3_uri"]

_SCHEME: Final = "s3://"
# ARNs that S3 takes in place of a bucket's name, as the AWS command line takes them: those of access points (of one
# region or of several, whose region is empty), of Object Lambda, and of access points on Outposts. The partition may be
# that of China or of a government. A part of an ARN's resource ends with "/" or with ":".
_ARN_BUCKET: Final = re.compile(
    r"arn:aws[a-z-]*:"
    r"(?:(?:s3|s3-object-lambda):[a-z0-9-]*:[0-9]{12}:accesspoint[:/][^/:]+"
    r"|s3-outposts:[a-z0-9-]+:[0-9]{12}:outpost[/:][A-Za-z0-9-]+[/:]accesspoint[/:][A-Za-z0-9-]+)"
)
_ARN_FORM: Final = "arn:aws:s3:REGION:ACCOUNT:accesspoint/NAME"


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split a URI into bucket and key.

    Returns:
        Bucket and key. The bucket may also be the ARN of an access point, as in
        ``s3://arn:aws:s3:us-east-1:123456789012:accesspoint/name/key``. The key is everything behind the bucket's
        slash, unchanged: ``%20``, ``+``, ``#`` and ``?`` have no special meaning. It is "" where the URI names a whole
        bucket.

    Raises:
        ConfigError: It is not an ``s3://`` URI, or names no bucket.
    """
    # Not urlsplit: keys may hold "#" and "?", which it would cut off as fragment and query.
    if not isinstance(uri, str) or not uri.startswith(_SCHEME):
        raise ConfigError(f"not an S3 URI: {uri!r}; write s3://bucket/key")
    rest = uri[len(_SCHEME) :]
    if rest.startswith("arn:"):
        return _split_arn(uri, rest)
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise ConfigError(f"no bucket in {uri!r}; write s3://bucket/key")
    return bucket, key


def _split_arn(uri: str, rest: str) -> tuple[str, str]:
    match = _ARN_BUCKET.match(rest)
    bucket = match[0] if match is not None else ""
    key = rest[len(bucket) :]
    # A colon may end the ARN, as the AWS command line has it for Outposts; any other character is still of a name.
    if not bucket or key[:1] not in ("", "/", ":"):
        raise ConfigError(f"{uri!r} begins with an ARN that is none of an access point; write s3://{_ARN_FORM}/key")
    return bucket, key[1:]
