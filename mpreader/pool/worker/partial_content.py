"""Check of the response to a ranged GET: compares its head with the request, and names the first difference.

Used by a worker's GET (:mod:`~mpreader.pool.worker.failure`) and by the streams in the caller's process
(:mod:`mpreader.s3.stream`). Both have their own HTTP client and raise their own errors, so the check is a pure
function: it uses no sockets and raises nothing. A body must not be used before the head of its response has passed.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

__all__ = ["ContentRange", "Mismatch", "PartialContent", "find_mismatch", "parse_content_range"]

# The number of digits is bounded, because a server is not trusted: int() of thousands of digits is slow, and raises
# ValueError since Python 3.11.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
# With aws-chunked the client that uploaded the object described its upload. S3 stores that word and repeats it in
# every response, but the body is the object's plain bytes.
_PLAIN_ENCODINGS = ("", "identity", "aws-chunked")


class Mismatch(enum.Enum):
    """Difference between a ranged GET and the response to it."""

    STATUS = 1  # not 206; with 200 the whole object would follow
    RANGE = 2  # other bytes than those requested, or no statement of which bytes
    VERSION = 3  # another ETag than the expected one, or none
    OBJECT_SIZE = 4  # another size than that of the expected version
    ENCODING = 5  # the body is compressed: its bytes are not the object's
    LENGTH = 6  # the body is shorter or longer than the range


class ContentRange(NamedTuple):
    """Parsed ``Content-Range`` header.

    Attributes:
        start: First byte of the object in the body.
        end: One past the last byte; the header itself names the last byte.
        object_size: Bytes of the whole object; None where the server sends ``*``.
    """

    start: int
    end: int
    object_size: int | None


class PartialContent(NamedTuple):
    """Status and headers of a response by which its body is accepted or refused.

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
        response: Status and headers of the response.
        start: First byte requested.
        end: One past the last byte requested.
        etag: ETag of the expected version; empty: any.
        object_size: Size of the expected version in bytes; None: any.

    Returns:
        The first difference, None if the body can be received.
    """
    if response.status != 206:
        return Mismatch.STATUS
    # The range comes first: it shows whether the body belongs to this request at all.
    named = parse_content_range(response.content_range)
    if named is None or (named.start, named.end) != (start, end):
        return Mismatch.RANGE
    # Before the size: when an object is overwritten, ETag and size differ, and the error must name the new version.
    # A different size with the right ETag is a server's mistake.
    if etag and response.etag != etag:
        return Mismatch.VERSION
    if object_size is not None and named.object_size not in (object_size, None):
        return Mismatch.OBJECT_SIZE
    if response.encoding not in _PLAIN_ENCODINGS:
        return Mismatch.ENCODING
    # None: a chunked body has no Content-Length; whoever receives it counts its bytes.
    if response.length not in (end - start, None):
        return Mismatch.LENGTH
    return None
