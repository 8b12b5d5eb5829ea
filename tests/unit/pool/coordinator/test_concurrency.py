"""Parts in flight: enough for a slow server, few for a fast one or a busy host."""

from __future__ import annotations

import pytest

from mpreader.pool.coordinator.concurrency import ConcurrencyLimiter

WORKERS, MOST = 2, 32
PART = 8 * 1024 * 1024
SERVER = ("host", 80, PART)


def idle() -> bool:
    return False


def simulate(limiter: ConcurrencyLimiter, seconds: float, processor_wait_s: float, rounds: int = 400) -> int:
    """Parts that all take equally long; the limit that the limiter settles at."""
    for number in range(rounds):
        now = 1.0 + number * 0.001
        limiter.limit(*SERVER, now)
        limiter.observe(*SERVER, seconds, processor_wait_s, now)
    return limiter.limit(*SERVER, 2.0 + rounds)


def test_limiter_uses_all_connections_where_each_is_slow() -> None:
    assert simulate(ConcurrencyLimiter(WORKERS, MOST, idle), seconds=0.093, processor_wait_s=0.005) == MOST


def test_limiter_uses_few_connections_where_each_is_fast() -> None:
    assert simulate(ConcurrencyLimiter(WORKERS, MOST, idle), seconds=0.004, processor_wait_s=0.0) <= 3 * WORKERS


def test_limiter_adds_no_connections_where_threads_wait_for_processors() -> None:
    assert simulate(ConcurrencyLimiter(WORKERS, MOST, idle), seconds=0.093, processor_wait_s=0.05) == 2 * WORKERS


def test_limiter_comes_down_when_the_host_becomes_busy() -> None:
    limiter = ConcurrencyLimiter(WORKERS, MOST, idle)
    assert simulate(limiter, seconds=0.093, processor_wait_s=0.0) == MOST
    assert simulate(limiter, seconds=0.093, processor_wait_s=0.06) == 2 * WORKERS


def test_limiter_asks_for_more_while_a_new_server_is_silent() -> None:
    limiter = ConcurrencyLimiter(WORKERS, MOST, idle)
    limits = [limiter.limit(*SERVER, 1.0 + tick * 0.015) for tick in range(10)]
    assert limits[0] == 2 * WORKERS
    assert limits[-1] == MOST
    assert limits == sorted(limits)


def test_limiter_waits_for_a_new_server_while_the_host_is_busy() -> None:
    limiter = ConcurrencyLimiter(WORKERS, MOST, lambda: True)
    assert [limiter.limit(*SERVER, 1.0 + tick) for tick in range(10)] == [2 * WORKERS] * 10


def test_limiter_learns_about_each_server_and_size_on_its_own() -> None:
    limiter = ConcurrencyLimiter(WORKERS, MOST, idle)
    assert simulate(limiter, seconds=0.093, processor_wait_s=0.0) == MOST
    assert limiter.limit("other", 80, PART, 9.0) == 2 * WORKERS
    assert limiter.limit("host", 80, PART // 64, 9.0) == 2 * WORKERS


@pytest.mark.parametrize("most", [1, 3])
def test_limiter_never_exceeds_the_connections(most: int) -> None:
    assert simulate(ConcurrencyLimiter(WORKERS, most, idle), seconds=0.093, processor_wait_s=0.0) == most
