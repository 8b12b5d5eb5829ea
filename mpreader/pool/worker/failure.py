"""Failures of a GET: the exception ``GetFailed``, the acceptance of a response, and the failure kind of a refused one.

Used by :mod:`~mpreader.pool.worker.connection`. It only names the kind of a failure. It must not retry: the coordinator
decides whether and when a part is requested again.
"""

from __future__ import annotations

import re
from typing import Final

from mpreader.pool.worker.http import MalformedResponse, Response
from mpreader.pool.worker.messages import FailureKind, Fetch
from mpreader.pool.worker.partial_content import Mismatch, PartialContent, find_mismatch
from mpreader.pool.worker.version import Validators, find_difference, validators_of

__all__ = ["BUSY_STATUSES", "REDIRECTS", "GetFailed", "check_response", "is_condition_refused"]

_MAX_ERROR_BODY_BYTES: Final = 16 * 1024  # a server is not trusted to send a short one
_MAX_DETAIL_CHARACTERS: Final = 600
_MAX_RETRY_AFTER_S: Final = 60.0  # a server may name hours; a part must not be put off for that long
# Statuses and S3's error codes after which the same request is likely to succeed later.
BUSY_STATUSES: Final = frozenset({408, 429, 500, 502, 503, 504})
_BUSY_CODES: Final = frozenset(
    {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "OperationAborted"}
)
_EXPIRED_CODES: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "RequestTimeTooSkewed"}
)
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
# All other statuses are REFUSED, and not tried again.
_KIND_BY_STATUS: Final = {
    **dict.fromkeys(REDIRECTS, FailureKind.REDIRECTED),
    200: FailureKind.MALFORMED,  # the whole object in place of a range
    401: FailureKind.DENIED,
    403: FailureKind.DENIED,
    404: FailureKind.MISSING,
    410: FailureKind.MISSING,
    412: FailureKind.CHANGED,
    416: FailureKind.CHANGED,  # the range was compared with the size that HEAD gave: the object is shorter now
}


class GetFailed(Exception):
    """A GET that brought no bytes, or not all of them.

    Attributes:
        kind: Kind of failure, by which the coordinator decides whether the part is requested again.
        detail: Description for people, without secrets.
        received: Number of bytes at the start of the part that were received, and are right.
        retry_after_s: Seconds that the server asks to wait, 0 where it does not.
        status: Status with which the server refuses the request; 0 if it does not refuse it.
        code: S3's error code of the refusal, such as ``"AccessDenied"``; "" if it has none.
    """

    def __init__(
        self,
        kind: FailureKind,
        detail: str,
        received: int = 0,
        retry_after_s: float = 0.0,
        status: int = 0,
        code: str = "",
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail[:_MAX_DETAIL_CHARACTERS]  # a server may send an ETag of any length, say
        self.received = received
        self.retry_after_s = retry_after_s
        self.status = status
        self.code = code


def check_response(response: Response, fetch: Fetch) -> Validators:
    """Accept the response to a GET only if its body will be exactly the requested bytes of the expected version.

    Called before any byte of the body is received, so that no byte of a wrong body gets into the slot.

    Returns:
        Validators of the response that the expected version does not have.

    Raises:
        GetFailed: The response is refused. The connection must be closed, since its body is left unread.
    """
    said = PartialContent(
        response.status,
        response.header("content-range"),
        response.length,
        validators_of(response.headers),
        response.header("content-encoding"),
    )
    expected = fetch.version
    mismatch = find_mismatch(
        said,
        start=fetch.start,
        end=fetch.end,
        object_size=expected.size,
        validators=expected.validators,
        encoding=expected.encoding,
    )
    if mismatch is Mismatch.STATUS:
        raise _refusal(response)
    if mismatch is not None:
        raise GetFailed(*_describe(mismatch, said, fetch))
    known = dict(expected.validators)
    return tuple(validator for validator in said.validators if validator[0] not in known)


def is_condition_refused(failure: GetFailed, is_proven: bool) -> bool:
    """True if a request may have been refused only because of its If-Match.

    Some servers know no If-Match (400, 501), or can't compare the ETag that they have sent themselves (412): a weak
    one, or one that a proxy has changed. Others, or what stands between, refuse it with any status, or hang up.

    Args:
        failure: Failure of the request.
        is_proven: True if the server has answered a request with If-Match before: then only those three statuses count.
    """
    # The kind is that of other reasons too: a status of 400 may stand for an expired token.
    kinds = {412: FailureKind.CHANGED, 400: FailureKind.REFUSED, 501: FailureKind.REFUSED}
    if failure.status in kinds:
        return kinds[failure.status] is failure.kind
    kinds_of_others = (FailureKind.DENIED, FailureKind.REFUSED, FailureKind.BROKEN)
    return not is_proven and (failure.kind in kinds_of_others or failure.status == 500)


def _describe(mismatch: Mismatch, said: PartialContent, fetch: Fetch) -> tuple[FailureKind, str]:
    """Name the kind of failure, and describe it."""
    if mismatch is Mismatch.VERSION:
        # A response without an ETag, say, does not show that the object has changed. It counts as malformed, which is
        # tried again: the next response may have the ETag.
        difference = find_difference(fetch.version.validators, said.validators)
        kind = FailureKind.CHANGED if difference is not None and difference.is_change else FailureKind.MALFORMED
        return kind, str(difference)
    if mismatch is Mismatch.OBJECT_SIZE:
        # Validators that were expected were right (they are compared first): the server states a wrong size of the same
        # object. Without validators, another size is the only sign of another version.
        kind = FailureKind.MALFORMED if fetch.version.validators else FailureKind.CHANGED
        return kind, f"the object has {said.object_size} bytes now, not {fetch.version.size}"
    if mismatch is Mismatch.ENCODING:
        detail = f"the server compresses the answer ({said.encoding[:40]}): its bytes are not the object's"
        return FailureKind.MALFORMED, detail
    if mismatch is Mismatch.LENGTH:
        detail = f"Content-Length {said.length}, not the {fetch.end - fetch.start} bytes asked for"
        return FailureKind.MALFORMED, detail
    expected = f"bytes {fetch.start}-{fetch.end - 1}/"
    return FailureKind.MALFORMED, f"asked for {expected!r}, answered with Content-Range {said.content_range!r}"


def _refusal(response: Response) -> GetFailed:
    status = response.status
    # Below 300 the body is not an error document: with status 200 it is the whole object, which must not be received.
    code, text = ("", "") if status < 300 else _read_error_document(response)
    detail = f"HTTP {status}" + (f" {code}" if code else "") + (f" ({text})" if text else "")
    if status in REDIRECTS:
        detail += f": redirected to {_origin_of(response.header('location'))}"
    if status == 200:
        detail += ": the server sends the whole object in place of a range"
    kind = _kind_of(status, code, text)
    return GetFailed(kind, detail, retry_after_s=_retry_after_s(response), status=status, code=code)


def _kind_of(status: int, code: str, text: str) -> FailureKind:
    # The code decides before the status: S3 reports an expired token, and also a timeout of its own, with status 400.
    # An expired presigned URL is a 403 AccessDenied like any other; only the message differs ("Request has expired").
    if code in _EXPIRED_CODES or (status == 403 and "expired" in text.lower()):
        return FailureKind.EXPIRED
    if status in BUSY_STATUSES or code in _BUSY_CODES:
        return FailureKind.BUSY
    return _KIND_BY_STATUS.get(status, FailureKind.REFUSED)


def _read_error_document(response: Response) -> tuple[str, str]:
    """Read S3's error document; returns its code and message, each empty if there is none."""
    # Nothing else is taken from the document: it may repeat the signature, which no error text may show.
    try:
        body = response.read(_MAX_ERROR_BODY_BYTES).decode("utf-8", "replace")
    except (OSError, MalformedResponse):
        return "", ""  # the status is enough for an error
    code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", body) for tag in ("Code", "Message"))
    return (code[1][:100] if code else ""), (message[1][:300] if message else "")


def _origin_of(location: str) -> str:
    """Return the server that a redirect leads to; what follows its name in the URL may be a secret."""
    match = re.match(r"(https?://)(?:[^/?#]*@)?([^/?#@\s]{1,255})", location, re.IGNORECASE)
    if match is not None:
        return match[1] + match[2]
    return "another path there" if location else "nowhere (no Location)"


def _retry_after_s(response: Response) -> float:
    text = response.header("retry-after")  # may also be a date, which is ignored
    # isascii, since isdigit alone also holds for characters such as "²", which float() refuses.
    return min(float(text), _MAX_RETRY_AFTER_S) if text.isascii() and text.isdigit() else 0.0
