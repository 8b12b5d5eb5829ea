"""Addresses of a server: the order in which they are tried, and which ones are left alone for how long."""

from __future__ import annotations

import collections
import socket
from types import SimpleNamespace

import pytest

from mpreader.pool.worker.addresses import Address, Addresses

FOUND = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", 80)) for number in range(2, 6)]
FIRST, SECOND, THIRD, FOURTH = ALL = [info[4] for info in FOUND]


class Clock:
    """Monotonic time, as the test sets it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("mpreader.pool.worker.addresses.time", clock)
    return clock


@pytest.fixture
def addresses(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Addresses that are tried as they are found, unless they are avoided."""
    monkeypatch.setattr("mpreader.pool.worker.addresses.os", SimpleNamespace(urandom=lambda _: b""))
    return Addresses()


def order(addresses: Addresses) -> list[Address]:
    return [info[4] for info in addresses.ordered("host", 80, FOUND)]


def strike(addresses: Addresses, address: Address, times: int = 2) -> None:
    for _ in range(times):
        addresses.struck(address)


def test_addresses_are_tried_in_random_order() -> None:
    addresses = Addresses()
    first = collections.Counter(order(addresses)[0] for _ in range(400))
    assert set(first) == set(ALL)
    assert min(first.values()) > 50
    assert set(order(addresses)) == set(ALL), "each one is tried"


def test_one_slow_request_says_nothing_of_its_address(addresses: Addresses) -> None:
    addresses.struck(FIRST)
    addresses.served(FIRST)
    addresses.struck(FIRST)
    assert order(addresses) == ALL


def test_address_with_two_slow_requests_in_a_row_comes_last_for_a_while(addresses: Addresses, clock: Clock) -> None:
    strike(addresses, FIRST)
    assert order(addresses) == [SECOND, THIRD, FOURTH, FIRST]
    clock.now += 4.9
    assert order(addresses) == [SECOND, THIRD, FOURTH, FIRST]
    clock.now += 0.2
    assert order(addresses) == ALL


def test_refusal_counts_at_once(addresses: Addresses) -> None:
    addresses.refused(FIRST)
    assert order(addresses)[-1] == FIRST


def test_address_is_avoided_for_longer_each_time_until_it_serves(addresses: Addresses, clock: Clock) -> None:
    for seconds in (5, 10, 20, 40, 80, 160, 300, 300):
        addresses.struck(FIRST)
        addresses.struck(FIRST)  # several connections of one time count as one
        clock.now += seconds - 0.1
        assert order(addresses)[-1] == FIRST
        clock.now += 0.2
        assert order(addresses) == ALL
    addresses.served(FIRST)
    addresses.struck(FIRST)
    assert order(addresses) == ALL
    addresses.struck(FIRST)
    clock.now += 5.1
    assert order(addresses) == ALL


def test_requests_that_were_under_way_do_not_end_an_avoidance(addresses: Addresses) -> None:
    strike(addresses, FIRST)
    addresses.served(FIRST)
    assert order(addresses)[-1] == FIRST


def test_of_addresses_that_are_all_avoided_that_comes_first_whose_time_is_over_first(
    addresses: Addresses, clock: Clock
) -> None:
    for address in (THIRD, FIRST, FOURTH, SECOND):
        addresses.refused(address)
        clock.now += 1
    assert order(addresses) == [THIRD, FIRST, FOURTH, SECOND]


def test_kept_connection_is_left_only_where_its_host_has_a_better_address(addresses: Addresses) -> None:
    addresses.ordered("host", 80, FOUND[:2])
    assert not addresses.should_leave("host", 80, FIRST)
    strike(addresses, FIRST)
    assert addresses.should_leave("host", 80, FIRST)
    assert not addresses.should_leave("host", 80, SECOND)
    assert not addresses.should_leave("host", 81, FIRST), "of this one no other address is known"
    assert not addresses.should_leave("host", 80, None)
    strike(addresses, SECOND)
    assert not addresses.should_leave("host", 80, FIRST), "the other one is no better"


def test_what_is_kept_is_bounded(addresses: Addresses) -> None:
    for number in range(3000):
        address = (f"10.0.{number // 250}.{number % 250}", 80)
        addresses.ordered(f"host{number}", 80, [(*FOUND[0][:4], address)])
        addresses.refused(address)
    assert len(addresses._records) <= 1024
    assert len(addresses._of_host) <= 1024
