"""Check of the response to a ranged GET: compares its head with the request, and names the first difference.

Used by a worker's GET (:mod:`~mpreader.pool.worker.failure`) and by the streams in the caller's process
(:mod:`mpreader.s3.stream`). Both have their own HTTP client and raise their own errors, so the check is a pure
function: it uses no sockets and raises nothing. A body must not be used before the head of its response has passed.

A response is accepted with status 206, or with 200 where the whole object was asked for: some servers answer that
without a Content-Range. The Content-Encoding of a stored object is the object's own affair, and its bytes are handed
out as they are stored. A body that a server compresses on the way is told by its length: it is not that of the range,
or is not stated, or the object seems to have another size.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

from mpreader.pool.worker.version import Validators, find_difference

__all__ = ["ContentRange", "Mismatch", "PartialContent", "find_mismatch", "is_compressed", "parse_content_range"]

# The number of digits is bounded, because a server is not trusted: int() of thousands of digits is slow, and raises
# ValueError since Python 3.11.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.IGNORECASE)
# Codings by which servers compress a body on the way. Others, such as aws-chunked and utf-8, are words that somebody
# has stored with an object.
_COMPRESSIONS: Final = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd", "dcb", "dcz"})


class Mismatch(enum.Enum):
    """Difference between a ranged GET and the response to it."""

    STATUS = 1  # neither 206 nor a 200 that is right; with other 200s the whole object would follow
    RANGE = 2  # other bytes than those requested, or no statement of which bytes
    VERSION = 3  # another version than the expected one, or no statement of which one
    OBJECT_SIZE = 4  # another size than that of the expected version
    ENCODING = 5  # the server compresses the body: its bytes are not the object's
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
        length: ``Content-Length``; None if there was none.
        validators: Validators that it has.
        encoding: ``Content-Encoding``; empty if there was none.
    """

    status: int
    content_range: str
    length: int | None
    validators: Validators = ()
    encoding: str = ""

    @property
    def object_size(self) -> int | None:
        """Bytes of the whole object, as the response states it; None if it does not."""
        if self.status == 200:  # the body is the whole object
            return self.length
        named = parse_content_range(self.content_range)
        return None if named is None else named.object_size


def parse_content_range(text: str) -> ContentRange | None:
    """Parse a ``Content-Range`` header; None if it is not one of bytes."""
    match = _CONTENT_RANGE.fullmatch(text)
    if match is None:
        return None
    first, last, size = match.groups()
    return ContentRange(int(first), int(last) + 1, None if size == "*" else int(size))


def is_compressed(encoding: str) -> bool:
    """True if a ``Content-Encoding`` names a coding by which servers compress."""
    return any(coding.strip().lower() in _COMPRESSIONS for coding in encoding.split(","))


def find_mismatch(
    response: PartialContent,
    *,
    start: int,
    end: int,
    object_size: int | None,
    validators: Validators = (),
    encoding: str = "",
) -> Mismatch | None:
    """Compare a response with the GET of bytes [start, end) of one version of an object.

    Args:
        response: Status and headers of the response.
        start: First byte requested.
        end: One past the last byte requested.
        object_size: Size of the expected version in bytes; None: any.
        validators: Validators of the expected version; empty: any version.
        encoding: ``Content-Encoding`` with which the expected version is known to be stored.

    Returns:
        The first difference, None if the body can be received.
    """
    # The range comes first: it shows whether the body belongs to this request at all.
    mismatch = _range_mismatch(response, start, end, object_size)
    if mismatch is not None:
        return mismatch
    # Before the size: when an object is overwritten, ETag and size differ, and the error must name the new version.
    # A different size with the right ETag is a server's mistake.
    if find_difference(validators, response.validators) is not None:
        return Mismatch.VERSION
    stated = response.object_size
    is_exact = stated is not None and object_size in (stated, None) and response.length == end - start
    if not is_exact and is_compressed(response.encoding) and response.encoding != encoding:
        return Mismatch.ENCODING
    if object_size is not None and stated not in (object_size, None):
        return Mismatch.OBJECT_SIZE
    # None: a chunked body has no Content-Length; whoever receives it counts its bytes.
    if response.length not in (end - start, None):
        return Mismatch.LENGTH
    return None


def _range_mismatch(response: PartialContent, start: int, end: int, object_size: int | None) -> Mismatch | None:
    named = parse_content_range(response.content_range)
    if response.status == 200:
        if (start, end) != (0, response.length if object_size is None else object_size):
            return Mismatch.STATUS
        if named is None:
            return None  # whoever states a range all the same must state the right one
    elif response.status != 206:
        return Mismatch.STATUS
    if named is None or (named.start, named.end) != (start, end):
        return Mismatch.RANGE
    return None
