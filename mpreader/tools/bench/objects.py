"""Source objects: the objects that a benchmark reads, and the ranges that it asks for.

The sweep chooses them here once, and every measurement reads the same ones. The module asks for names and sizes, and
reads no bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from mpreader.config import S3ClientConfig
from mpreader.errors import ObjectMissing, PlanError
from mpreader.sources.http import HttpSource
from mpreader.sources.uri import without_secrets

__all__ = ["SourceObject", "find_objects", "passes"]

_MOST_LISTED: Final = 10_000  # enough large objects to measure with; a bucket may have millions


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object that is read.

    Attributes:
        source: ``s3://bucket/key``, or the URL with its secrets.
        nbytes: Its size.
    """

    source: str
    nbytes: int


def find_objects(source: str, nbytes: int, s3client_config: S3ClientConfig) -> list[SourceObject]:
    """Find the object, or the largest objects below the prefix, until they have ``nbytes`` bytes together.

    Args:
        source: ``s3://bucket/key``, ``s3://bucket/prefix`` or an http(s) URL.
        nbytes: Bytes that are wanted; all objects together may have less.
        s3client_config: Settings of the S3 client.

    Raises:
        PlanError: There are objects, but all are empty.
        ObjectMissing: There is none.
    """
    if source.startswith("s3://"):
        found = _find_on_s3(source, s3client_config)
    else:
        found = [SourceObject(source, HttpSource(source, s3client_config.max_attempts).open().size)]
    largest = sorted((item for item in found if item.nbytes), key=lambda item: item.nbytes, reverse=True)
    if not largest:
        raise PlanError(f"{without_secrets(source)} is empty: there is nothing to measure with")
    # For each object the bytes of those before it: it is taken as long as they are too few.
    before = itertools.accumulate((item.nbytes for item in largest), initial=0)
    return [item for item, others in zip(largest, before, strict=False) if others < nbytes]


def passes(objects: Sequence[SourceObject], nbytes: int, part_size: int) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Cut ``nbytes`` bytes of the objects into ranges of at most ``part_size``.

    Yields:
        One pass over the objects: ``(start, end)`` by source, ends exclusive. There are several passes where the
        objects have less than ``nbytes``.
    """
    left = nbytes
    while left:
        ranges: dict[str, list[tuple[int, int]]] = {}
        for item in objects:
            size = min(item.nbytes, left)
            left -= size
            if size:
                ranges[item.source] = [(start, min(start + part_size, size)) for start in range(0, size, part_size)]
        yield ranges


def _find_on_s3(source: str, s3client_config: S3ClientConfig) -> list[SourceObject]:
    # Imported here: boto3 is slow to import, and http(s) URLs don't need it.
    from mpreader.readers.client import S3Client
    from mpreader.s3 import parse_s3_uri

    bucket, key = parse_s3_uri(source)
    client = S3Client(s3client_config=s3client_config)
    try:
        missing = ObjectMissing(f"{source}: there are no objects below it", bucket=bucket, key=key)
        # A URI may name an object or a prefix, and only S3 knows which: the object is tried first.
        if key and not key.endswith("/"):
            try:
                return [SourceObject(source, client.head_object(bucket, key).size)]
            except ObjectMissing as error:
                missing = error  # it says more, if there is no such prefix either
        prefix = f"{key.rstrip('/')}/" if key else ""
        pages = client.list_objects(bucket, prefix)
        listed = itertools.islice((info for page in pages for info in page.object_info), _MOST_LISTED)
        found = [SourceObject(f"s3://{bucket}/{info.key}", info.size) for info in listed]
        if not found:
            raise missing
        return found
    finally:
        client.close()
