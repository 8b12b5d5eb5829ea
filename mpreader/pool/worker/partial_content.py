"""Check of a response to a ranged GET: names the first thing in which it differs from the request.

Used by a worker's GET (:mod:`~mpreader.pool.worker.failure`) and by the readers that read in the caller's process
(:mod:`mpreader.s3.stream`), which read the headers with different HTTP clients and raise different errors. Pure: no
sockets, no exceptions. A body must not be used before the response to it has passed this check.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

__all__ = ["ContentRange", "Mismatch", "PartialContent", "find_mismatch", "parse_content_range"]

# Of a bounded length: converting a number of thousands of digits is slow, and an error since Python 3.11.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
# aws-chunked tells how the object was uploaded; S3 repeats it, and sends the plain bytes.
_PLAIN_ENCODINGS = ("", "identity", "aws-chunked")


class Mismatch(enum.Enum):
    """Difference between a ranged GET and the response to it."""

    STATUS = 1  # not 206; with 200 the whole object would follow
    RANGE = 2  # other bytes than those requested, or no statement of which bytes
    VERSION = 3  # another ETag than the expected one, or none
    OBJECT_SIZE = 4
    ENCODING = 5  # the body is compressed: its bytes are not the object's
    LENGTH = 6  # the body is shorter or longer than the range


class ContentRange(NamedTuple):
    """Parsed ``Content-Range``: bytes [start, end) of an object; its size is None where the server says ``*``."""

    start: int
    end: int
    object_size: int | None


class PartialContent(NamedTuple):
    """Headers of a response that say what its body will be.

    Attributes:
        status: Status code.
        content_range: ``Content-Range`` as it came; empty if there was none.
        etag: ``ETag`` with its quotes; empty if there was none.
        length: ``Content-Length``; None if there was none.
        encoding: ``Content-Encoding``; empty if there was none, or if the caller takes the body as it is stored.
    """

    status: int
    content_range: str
    etag: str
    length: int | None
    encoding: str = ""


def parse_content_range(text: str) -> ContentRange | None:
    """Parse a ``Content-Range`` header; None if it is not one of bytes."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, size = match.groups()
    return ContentRange(int(first), int(last) + 1, None if size == "*" else int(size))


def find_mismatch(
    response: PartialContent, *, start: int, end: int, etag: str, object_size: int | None
) -> Mismatch | None:
    """Compare a response with the GET of bytes [start, end) of one version of an object.

    Args:
        response: What the response's head says.
        start: First byte requested.
        end: One past the last byte requested.
        etag: ETag of the expected version; empty: any.
        object_size: Size of the expected version in bytes; None: any.

    Returns:
        The first difference, None if the body can be received. The version is compared before the size: of an
        overwritten object both differ, while another size under the right ETag is a server's mistake.
    """
    if response.status != 206:
        return Mismatch.STATUS
    named = parse_content_range(response.content_range)
    if named is None or (named.start, named.end) != (start, end):
        return Mismatch.RANGE
    if etag and response.etag != etag:
        return Mismatch.VERSION
    if object_size is not None and named.object_size not in (object_size, None):
        return Mismatch.OBJECT_SIZE
    if response.encoding not in _PLAIN_ENCODINGS:
        return Mismatch.ENCODING
    if response.length not in (end - start, None):
        return Mismatch.LENGTH
    return None
