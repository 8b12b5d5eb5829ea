"""Retries end, grow apart, and end in an error with all facts. Which failures pass: see faults/test_network.py."""

from __future__ import annotations

import pytest

from mpreader.errors import PoolTimeout, TransportError
from mpreader.pool.coordinator.retry import delay_before, error_after, timeout_error
from mpreader.pool.requests import SourceName
from mpreader.pool.worker.messages import Failed, FailureKind

NAME = SourceName("s3://models/a/b.distcp", "models", "a/b.distcp", 10)
RETRIED = [FailureKind.UNREACHABLE, FailureKind.BROKEN, FailureKind.STALLED, FailureKind.BUSY]


def failed(kind: FailureKind, retry_after_s: float = 0.0) -> Failed:
    return Failed(1, kind, 0, "HTTP 999", retry_after_s)


def attempts_of(kind: FailureKind, max_attempts: int) -> int:
    """Number of times that a GET is made which ends in this failure each time."""
    attempts = 1
    while delay_before(failed(kind), attempts, max_attempts, attempts) is not None:
        attempts += 1
    return attempts


@pytest.mark.parametrize("kind", FailureKind)
def test_retry_ends_at_max_attempts(kind: FailureKind) -> None:
    assert attempts_of(kind, 1) == 1
    assert attempts_of(kind, 10) <= 10
    if kind in RETRIED:
        assert attempts_of(kind, 10) == 10


def test_retry_of_wrong_answers_ends_soon() -> None:
    assert attempts_of(FailureKind.MALFORMED, 10) == 3


@pytest.mark.parametrize("kind", RETRIED)
def test_retry_delays_grow_with_jitter_up_to_a_bound(kind: FailureKind) -> None:
    first, late, last = (
        [delay_before(failed(kind), attempt, 99, 0) or 0 for _ in range(40)] for attempt in (1, 20, 98)
    )
    assert all(len(set(delays)) > 1 for delays in (first, late)), "a thousand parts must not come back at one time"
    assert 0 < max(first) < 1 < min(late)
    assert max(last) < 2 * min(late), "they don't grow for ever"


def test_retry_outlives_a_brown_out_of_30_s_within_ten_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda least, _: least)
    assert sum(delay_before(failed(FailureKind.BUSY), attempt, 10, 0) or 0 for attempt in range(1, 10)) > 30


def test_retry_waits_as_long_as_the_server_asks() -> None:
    assert delay_before(failed(FailureKind.BUSY, retry_after_s=7.0), 1, 10, 0) == 7.0


@pytest.mark.parametrize("kind", FailureKind)
def test_error_after_the_last_attempt_names_everything(kind: FailureKind) -> None:
    error = error_after(failed(kind), NAME, (100, 200), 4)
    assert isinstance(error, TransportError)
    assert (error.bucket, error.key, error.range, error.attempts) == ("models", "a/b.distcp", (100, 200), 4)
    for fact in ("models/a/b.distcp", "100-200", "HTTP 999", "4 attempts"):
        assert fact in str(error)


def test_timeout_error_names_the_setting() -> None:
    error = timeout_error(NAME, (0, 5), 300.0, "HTTP 503")
    assert isinstance(error, PoolTimeout)
    for fact in ("models/a/b.distcp", "0-5", "300 s", "HTTP 503", "MPREADER_TIMEOUT_S"):
        assert fact in str(error)
