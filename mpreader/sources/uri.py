"""Sources by URI: ``s3://bucket/key`` is an object of S3, an http(s) URL is an object of a web server.

Used by :mod:`mpreader.fetch`, and by all that names a URI in a text. It must not import boto3 or urllib3 before a URI
needs them: both are slow to import.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpreader.errors import ConfigError
from mpreader.pool.source import Source

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client  # imports boto3
    from mpreader.sources.network import Headers

__all__ = ["source_of", "without_secrets"]


def source_of(uri: str, client: Callable[[], BaseS3Client], max_attempts: int, headers: Headers = ()) -> Source:
    """Make the source of a URI. Makes no request.

    Args:
        uri: ``s3://bucket/key`` or an http(s) URL.
        client: Returns the client for S3. Called for objects of S3 only.
        max_attempts: Largest number of requests that are made of a web server for the same bytes. For S3 the client's
            settings decide.
        headers: Further headers for a web server.

    Raises:
        ConfigError: ``uri`` is neither, or names a bucket without an object in it.
    """
    if not isinstance(uri, str):
        raise ConfigError(f"a source is text such as s3://bucket/key or https://host/path, got {uri!r}")
    if not uri.startswith("s3://"):
        from mpreader.sources.http import HttpSource

        return HttpSource(uri, max_attempts, headers)
    # Called before the imports below, which take 0.1 s because of boto3: the callable may start the worker processes,
    # which then come up during the imports.
    s3_client = client()
    from mpreader.s3 import parse_s3_uri
    from mpreader.sources.s3 import S3Source

    bucket, key = parse_s3_uri(uri)
    if not key:
        raise ConfigError(f"{uri!r} names a bucket, not an object in it; write s3://bucket/key")
    return S3Source(s3_client, bucket, key)


def without_secrets(uri: str) -> str:
    """Return a URI as it may be shown: of a URL, user name, password and query are left out, which may be secrets."""
    scheme, mark, rest = uri.partition("://")
    if not mark or scheme in ("s3", "file"):
        return uri
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"
