"""URIs of objects in S3: ``s3://bucket/key``. The one parser, for the library and the commands; pure."""

from __future__ import annotations

from typing import Final

from mpreader.errors import ConfigError

__all__ = ["parse_s3_uri"]

_SCHEME: Final = "s3://"


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split a URI into bucket and key.

    Returns:
        Bucket and key. The key is everything behind the bucket's slash, unchanged: ``%20``, ``+``, ``#`` and ``?`` have
        no special meaning. It is "" where the URI names a whole bucket.

    Raises:
        ConfigError: It is not an ``s3://`` URI, or names no bucket.
    """
    # Not urlsplit: keys may hold "#" and "?", which it would cut off as fragment and query.
    if not isinstance(uri, str) or not uri.startswith(_SCHEME):
        raise ConfigError(f"not an S3 URI: {uri!r}; write s3://bucket/key")
    bucket, _, key = uri[len(_SCHEME) :].partition("/")
    if not bucket:
        raise ConfigError(f"no bucket in {uri!r}; write s3://bucket/key")
    return bucket, key
