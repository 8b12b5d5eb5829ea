"""Meetings of ranks by a name: threads stand for ranks, the sockets are real."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from mpreader.pool.hosts.identity import HostOffer, HostShare
from mpreader.pool.hosts.meeting import meet


def offer(number: int, host: str = "host") -> HostOffer:
    return HostOffer(host, b"\0address %d" % number, b"token %d" % number)


def meet_all(name: str, offers: list[HostOffer], ranks: int, timeout_s: float = 30) -> list[HostShare | None]:
    with ThreadPoolExecutor(len(offers)) as threads:
        return list(threads.map(lambda one: meet(name, ranks, one, timeout_s=timeout_s), offers))


def test_ranks_meet_again_and_again_under_one_name() -> None:
    for round_number in range(20):
        offers = [offer(10 * round_number + number) for number in range(4)]
        shares = meet_all("again", offers, ranks=4)
        assert sorted(share.place for share in shares if share is not None) == [0, 1, 2, 3]
        (leader,) = {share.leader for share in shares if share is not None}
        place_of = {one: share.place for one, share in zip(offers, shares, strict=True) if share is not None}
        assert place_of[leader] == 0


def test_ranks_of_other_settings_do_not_share() -> None:
    offers = [offer(0), offer(1), offer(2, "other settings")]
    shares = meet_all("settings", offers, ranks=3)
    assert [share and share.ranks for share in shares] == [2, 2, None]
    assert meet("alone", 1, offer(0)) is None
    with ThreadPoolExecutor(3) as threads:
        taking_part = [offer(0), None, offer(1)]
        shares = list(threads.map(lambda one: meet("not all", 3, one), taking_part))
    assert [share and share.ranks for share in shares] == [2, None, 2]


def test_ranks_that_do_not_come_are_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    shares = meet_all("late", [offer(0), offer(1)], ranks=3, timeout_s=0.3)
    assert [share and share.ranks for share in shares] == [2, 2]
    assert "only 2 of 3 ranks have come to load 'late'" in caplog.text


@pytest.mark.parametrize("hello", [b"", b"\xff\xff\xff\xff", b"\x02\0\0\0[]", b"\x02\0\0\0{]", b"\x02\0\0\0{}"])
def test_process_that_says_something_else_is_left_out(hello: bytes) -> None:
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, "stranger", 2, offer(0))
        with socket.socket(socket.AF_UNIX) as stranger:
            _connect(stranger)
            stranger.sendall(hello)
            stranger.shutdown(socket.SHUT_WR)
            second = threads.submit(meet, "stranger", 2, offer(1))
            shares = [first.result(30), second.result(30)]
    assert sorted(share.place for share in shares if share is not None) == [0, 1]


def _connect(stranger: socket.socket) -> None:
    """Connect to the only meeting of this process, as soon as it listens."""
    while True:
        with open("/proc/net/unix") as sockets:
            names = [line.split()[-1] for line in sockets if "@mpreader-meeting-" in line]
        for name in names:
            try:
                stranger.connect("\0" + name[1:])
            except ConnectionRefusedError:
                continue
            return
