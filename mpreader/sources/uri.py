"""Sources by URI: ``s3://bucket/key`` is an object of S3, an http(s) URL is an object of a web server."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpreader.errors import ConfigError
from mpreader.pool.source import Source

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client

__all__ = ["source_of"]


def source_of(uri: str, client: Callable[[], BaseS3Client], max_attempts: int) -> Source:
    """Make the source of a URI. Makes no request, and imports boto3 or urllib3 only where it is needed.

    Args:
        uri: ``s3://bucket/key`` or an http(s) URL.
        client: Returns the client for S3. Called for an object of S3 only, and before boto3 is imported here, which
            takes 0.2 s: what can be done meanwhile may begin in it.
        max_attempts: Requests that are made of a web server for the same bytes before giving up; those of S3 are
            counted by the client's settings.

    Raises:
        ConfigError: ``uri`` is neither, or names a bucket and no object in it.
    """
    if not isinstance(uri, str):
        raise ConfigError(f"a source is text such as s3://bucket/key or https://host/path, got {uri!r}")
    if not uri.startswith("s3://"):
        from mpreader.sources.http import HttpSource

        return HttpSource(uri, max_attempts)
    s3_client = client()
    from mpreader.s3 import parse_s3_uri
    from mpreader.sources.s3 import S3Source

    bucket, key = parse_s3_uri(uri)
    if not key:
        raise ConfigError(f"{uri!r} names a bucket, not an object in it; write s3://bucket/key")
    return S3Source(s3_client, bucket, key)
