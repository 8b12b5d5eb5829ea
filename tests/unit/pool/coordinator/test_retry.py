"""When a GET is made again, and the error when it is not."""

from __future__ import annotations

import pytest

from mpreader.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    PoolTimeout,
    ShortRead,
    TransportError,
)
from mpreader.pool.coordinator.retry import delay_before, error_after, timeout_error
from mpreader.pool.requests import SourceName
from mpreader.pool.worker.messages import Failed, FailureKind

RETRIED = {
    FailureKind.UNREACHABLE,
    FailureKind.BROKEN,
    FailureKind.STALLED,
    FailureKind.BUSY,
    FailureKind.MALFORMED,
    FailureKind.CANCELLED,
}


NAME = SourceName("s3://models/a/b.distcp", "models", "a/b.distcp", 10)


def failed(kind: FailureKind, retry_after_s: float = 0.0) -> Failed:
    return Failed(1, kind, 0, "HTTP 999", retry_after_s)


@pytest.mark.parametrize("kind", FailureKind)
def test_retry_only_what_may_go_well_the_next_time(kind: FailureKind) -> None:
    assert (delay_before(failed(kind), 1, 10) is not None) == (kind in RETRIED)


@pytest.mark.parametrize("kind", sorted(RETRIED - {FailureKind.MALFORMED}))
def test_retry_ends_at_max_attempts(kind: FailureKind) -> None:
    assert delay_before(failed(kind), 9, 10) is not None
    assert delay_before(failed(kind), 10, 10) is None
    assert delay_before(failed(kind), 1, 1) is None


def test_retry_of_wrong_answers_ends_soon() -> None:
    assert delay_before(failed(FailureKind.MALFORMED), 2, 10) is not None
    assert delay_before(failed(FailureKind.MALFORMED), 3, 10) is None


@pytest.mark.parametrize("kind", sorted(RETRIED - {FailureKind.MALFORMED}))
def test_retry_delays_grow_with_jitter_up_to_a_bound(kind: FailureKind) -> None:
    first, late = ([delay_before(failed(kind), attempt, 99) or 0 for _ in range(40)] for attempt in (1, 20))
    for delays in (first, late):
        assert len(set(delays)) > 1, "a thousand parts must not come back at one time"
    assert 0 < min(first) <= max(first) <= 0.5
    assert 8 <= min(late) <= max(late) <= 16


def test_retry_outlives_a_brown_out_of_30_s_within_ten_attempts() -> None:
    shortest = sum(0.5 * min(16, 0.5 * 2**n) for n in range(9))
    assert shortest > 30
    assert all((delay_before(failed(FailureKind.BUSY), n, 10) or 0) >= 0.25 * 2 ** (n - 1) for n in range(1, 7))


def test_retry_waits_as_long_as_the_server_asks() -> None:
    assert delay_before(failed(FailureKind.BUSY, retry_after_s=7.0), 1, 10) == 7.0


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        (FailureKind.UNREACHABLE, TransportError),
        (FailureKind.BROKEN, ShortRead),
        (FailureKind.STALLED, TransportError),
        (FailureKind.BUSY, TransportError),
        (FailureKind.MALFORMED, TransportError),
        (FailureKind.EXPIRED, AccessDenied),
        (FailureKind.DENIED, AccessDenied),
        (FailureKind.MISSING, ObjectMissing),
        (FailureKind.CHANGED, ObjectChanged),
        (FailureKind.REFUSED, TransportError),
        (FailureKind.CANCELLED, TransportError),
    ],
)
def test_error_after_the_last_attempt_names_everything(kind: FailureKind, cls: type[TransportError]) -> None:
    error = error_after(failed(kind), NAME, (100, 200), 4)
    assert type(error) is cls
    assert isinstance(error, TransportError)
    assert (error.bucket, error.key, error.range, error.attempts) == ("models", "a/b.distcp", (100, 200), 4)
    for fact in ("models/a/b.distcp", "100-200", "HTTP 999", "4 attempts"):
        assert fact in str(error)


def test_timeout_error_names_the_setting() -> None:
    error = timeout_error(NAME, (0, 5), 300.0, "HTTP 503")
    assert isinstance(error, PoolTimeout)
    for fact in ("models/a/b.distcp", "0-5", "300 s", "HTTP 503", "MPREADER_TIMEOUT_S"):
        assert fact in str(error)
