"""Retry policy: decides whether and when a failed GET is repeated, and words the error if it is not.

Pure functions, used by the scheduler. An attempt counts against ``max_attempts`` only if it brought no byte: the
scheduler begins to count anew when bytes have come, so that a large part over a bad line still arrives.
"""

from __future__ import annotations

import copy
import random
from typing import Final

from mpreader.errors import (
    AccessDenied,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PoolTimeout,
    ShortRead,
    TransportError,
)
from mpreader.pool.requests import SourceName
from mpreader.pool.worker.messages import Failed, FailureKind

__all__ = ["about_range", "delay_before", "error_after", "timeout_error"]

_RETRIED: Final = frozenset(
    {
        FailureKind.UNREACHABLE,
        FailureKind.BROKEN,
        FailureKind.STALLED,
        FailureKind.BUSY,
        FailureKind.MALFORMED,
        # Of a part that is still wanted: the cancelling of the one before it on the same connection came too late.
        FailureKind.CANCELLED,
    }
)
_MAX_DELAY_S: Final = 16.0
_FIRST_DELAY_S: Final = {FailureKind.BUSY: 0.5, FailureKind.UNREACHABLE: 0.1}
# A wrong answer is rarely right the next time: a few tries are enough to tell.
_MAX_MALFORMED: Final = 3


def delay_before(failure: Failed, attempts: int, max_attempts: int, malformed: int) -> float | None:
    """Seconds to wait before the next attempt, None if there is to be none.

    Exponential with jitter: between half of it and all of it, so that a brown-out of 30 s is outlived within ten
    attempts, and a thousand parts don't come back at one time.

    Args:
        failure: Result of the last attempt.
        attempts: Number of attempts since bytes last came, at least 1.
        max_attempts: Most attempts.
        malformed: Number of those attempts that a wrong answer has ended.
    """
    if failure.kind not in _RETRIED or attempts >= max_attempts:
        return None
    if failure.kind is FailureKind.MALFORMED and malformed >= _MAX_MALFORMED:
        return None
    first = _FIRST_DELAY_S.get(failure.kind, 0.02)
    delay = min(_MAX_DELAY_S, first * 2.0 ** (attempts - 1))
    return max(failure.retry_after_s, delay * random.uniform(0.5, 1.0))  # noqa: S311  # spreads load, guards nothing


def error_after(failure: Failed, source: SourceName, byte_range: tuple[int, int], attempts: int) -> MpreaderError:
    """Makes the error that a consumer gets when no attempt is left; ``byte_range`` is [start, end) of the part."""
    name = f"{source.uri} bytes {byte_range[0]}-{byte_range[1]} (end exclusive)"
    tried = "1 attempt" if attempts == 1 else f"{attempts} attempts"
    cls, what, advice = _WORDING.get(failure.kind, (TransportError, "the read failed", ""))
    if failure.kind is FailureKind.DENIED and source.uri.startswith("s3://"):
        advice = "s3:GetObject on this key is needed"
    message = f"{what}: {name}: {failure.detail} ({tried}){'. ' + advice if advice else ''}"
    return cls(message, bucket=source.bucket, key=source.key, range=byte_range, attempts=attempts)


def about_range(error: MpreaderError, byte_range: tuple[int, int]) -> MpreaderError:
    """Returns the error of a source, with the range of a part that fails by it among its facts."""
    if not isinstance(error, TransportError) or error.range is not None:
        return error
    ranged = copy.copy(error)
    ranged.range, ranged.__cause__ = byte_range, error.__cause__
    return ranged


def timeout_error(source: SourceName, byte_range: tuple[int, int], timeout_s: float, last: str) -> PoolTimeout:
    """Makes the error of a part that was not there within ``PoolConfig.timeout_s``; ``last`` is its last failure."""
    return PoolTimeout(
        f"{source.uri} bytes {byte_range[0]}-{byte_range[1]} were not read within {timeout_s:g} s "
        f"(last failure: {last or 'none'}). If the network is that slow, raise PoolConfig.timeout_s "
        "(MPREADER_TIMEOUT_S)"
    )


_WORDING: Final[dict[FailureKind, tuple[type[TransportError], str, str]]] = {
    FailureKind.UNREACHABLE: (TransportError, "no connection", "Check endpoint_url, DNS, proxies and the CA bundle"),
    FailureKind.BROKEN: (ShortRead, "the connection kept breaking before the last byte", ""),
    FailureKind.STALLED: (
        TransportError,
        "the server stalled",
        "If the network is that slow, raise PoolConfig.stall_timeout_s (MPREADER_STALL_TIMEOUT_S)",
    ),
    FailureKind.BUSY: (
        TransportError,
        "the service kept asking for fewer requests",
        "Raise S3ClientConfig.max_attempts, or lower PoolConfig.workers or connections_per_worker",
    ),
    FailureKind.MALFORMED: (TransportError, "the server's answers are not what was asked for", ""),
    FailureKind.EXPIRED: (
        AccessDenied,
        "credentials expired",
        "Renew them (aws sso login, a fresh session token), or check this host's clock",
    ),
    FailureKind.DENIED: (AccessDenied, "access denied", ""),
    FailureKind.MISSING: (ObjectMissing, "the object is gone", "It existed when the load began"),
    FailureKind.CHANGED: (
        ObjectChanged,
        "the object was overwritten during the load",
        "Load again; don't write to a checkpoint that is being read",
    ),
    FailureKind.REFUSED: (TransportError, "the request was refused", ""),
    FailureKind.REDIRECTED: (TransportError, "the server redirects the requests of the workers", ""),
    FailureKind.CANCELLED: (TransportError, "the read was cancelled", ""),
}
