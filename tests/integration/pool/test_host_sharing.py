"""The leader of a host and its members over real sockets; who must not take part is told nothing."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest

from mpreader.config import KiB
from mpreader.errors import PlanError, PoolError
from mpreader.pool.hosts.board import Board
from mpreader.pool.hosts.channel import Channel
from mpreader.pool.hosts.identity import TOKEN_BYTES, HostOffer, HostShare, Listener
from mpreader.pool.hosts.member import HostMember
from mpreader.pool.hosts.messages import HostLost, Joined, SharedRead, Subscription
from mpreader.pool.hosts.server import HostServer
from mpreader.pool.requests import GiveBack, ReadId, SlotArrived, SlotRead
from mpreader.pool.stats import PoolStats
from mpreader.pool.worker.messages import MapSegment
from mpreader.ranges import Part
from mpreader.shared_memory import fill, open_shared_memory

if TYPE_CHECKING:
    from mpreader.pool.source import Source
    from mpreader.pool.transfer import Transfer
    from mpreader.testing import FaultServer
    from tests.integration.conftest import MakePool, ServedSource

pytestmark = pytest.mark.timeout(60)

PART: Final = 64 * KiB
OTHER_USER: Final = 12345


def slot_read_of(index: int) -> SlotRead:
    return SlotRead(0, PART, (Part(index * PART, (index + 1) * PART),))


class Leader:
    """The server of a host's leader, whose ranks need parts by their numbers.

    Attributes:
        server: The server.
        ended: Statistics and number of ranks, when the read is over.
    """

    def __init__(self, make_pool: MakePool, source: Source, ranks: int, need: Sequence[int]) -> None:
        self.listener = Listener()
        self.share = HostShare(HostOffer("host", self.listener.address, self.listener.token), 0, ranks)
        self.ended: list[tuple[PoolStats, int]] = []
        self.is_over = threading.Event()
        self._source = source
        pool = make_pool(max_memory=1 << 20, part_size=PART)
        self.server = HostServer(self.listener, ranks, pool, self._plan, need, drop_after_s=30.0, on_end=self._note_end)

    def member(self, place: int, need: Sequence[int]) -> HostMember:
        return HostMember(self.share._replace(place=place), need)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(30)
        connection.connect(self.listener.address)
        return connection

    def _plan(self, needs: Sequence[Any]) -> tuple[Sequence[Source], SharedRead]:
        union = sorted({index for need in needs for index in need})
        subscriptions = [Subscription(f"{len(need)}", tuple(map(union.index, need)), (0,)) for need in needs]
        return [self._source], SharedRead(tuple(map(slot_read_of, union)), tuple(subscriptions))

    def _note_end(self, stats: PoolStats, ranks: int) -> None:
        self.ended.append((stats, ranks))
        self.is_over.set()


@pytest.fixture
def lead(make_pool: MakePool, source: ServedSource) -> Iterator[Any]:
    with contextlib.ExitStack() as leaders:

        def lead(ranks: int, need: Sequence[int] = (0, 1, 2)) -> Leader:
            leader = Leader(make_pool, source, ranks, need)
            leaders.callback(leader.server.close)
            return leader

        yield lead


def take_all(host: HostServer | HostMember, need: Sequence[int], source: Source, data: bytes) -> Transfer:
    """Take what a rank needs, and leave."""
    transfer = host.begin([source])
    for place, index in enumerate(need):
        host.flush()
        view = transfer.take(place)
        assert view == data[index * PART : (index + 1) * PART]
        host.check_held()
        del view
    transfer.close()
    host.leave()
    return transfer


def check_leader_goes_on(leader: Leader, source: Source, data: bytes, need: Sequence[int] = (1, 2, 3)) -> None:
    """Check that the leader and one member, which has joined or is about to, read well."""
    with ThreadPoolExecutor(1) as threads:
        own = threads.submit(take_all, leader.server, (0, 1, 2), source, data)
        member = leader.member(1, need)
        take_all(member, need, source, data)
        own.result()
    assert leader.is_over.wait(30)
    assert leader.ended[0][1] == 2


def test_ranks_of_one_process_receive_each_part_once(
    lead: Any, source: ServedSource, data: bytes, server: FaultServer
) -> None:
    needs = [range(20), range(10, 30), range(0, 30, 3)]
    leader: Leader = lead(3, needs[0])

    def load(place: int) -> Transfer:
        host = leader.server if place == 0 else leader.member(place, needs[place])
        assert host.joined().answer == f"{len(needs[place])}"
        transfer = take_all(host, needs[place], source, data)
        if place:
            host.close()
        return transfer

    with ThreadPoolExecutor(3) as threads:
        transfers = list(threads.map(load, range(3)))
    assert leader.is_over.wait(30)
    [(stats, ranks)] = leader.ended
    assert ranks == 3
    assert stats.bytes == 30 * PART
    assert [transfer.taken_bytes for transfer in transfers] == [len(need) * PART for need in needs]
    assert sorted(request.range for request in server.requests if request.range) == sorted(
        f"bytes={index * PART}-{(index + 1) * PART - 1}" for index in range(30)
    )


@pytest.mark.parametrize("is_leader", [True, False], ids=["leader", "member"])
def test_views_that_a_rank_keeps_when_it_leaves_keep_no_memory_from_the_others(
    lead: Any, source: ServedSource, data: bytes, is_leader: bool
) -> None:
    few, many = range(16), range(40)  # memory has room for 16
    leader: Leader = lead(2, few if is_leader else many)
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(leader.member, 1, many if is_leader else few)
        first, second = leader.server, joining.result()
        ranks: list[HostServer | HostMember] = [first, second] if is_leader else [second, first]
        other = threads.submit(take_all, ranks[1], many, source, data)
        transfer = ranks[0].begin([source])
        views = [transfer.take(place) for place in few]
        transfer.close()
        ranks[0].leave()
        other.result()
    del views


class LargeNeed(tuple[int, ...]):
    """A need that comes with more bytes than a socket holds."""

    def __init__(self, _: Sequence[int]) -> None:
        self.plan = bytes(8 << 20)


def test_need_may_be_larger_than_what_a_socket_holds_at_one_time(
    lead: Any, source: ServedSource, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpreader.pool.hosts.server._GATHER_S", 50.0)
    leader: Leader = lead(2)
    check_leader_goes_on(leader, source, data, LargeNeed((1, 2, 3)))


MEMBER: Final = """
import pickle, sys
from mpreader.pool.hosts.member import HostMember

share, size = pickle.loads(bytes.fromhex(sys.argv[1]))
member = HostMember(share, (1, 2, 3))
class Source:
    uri, bucket, key, max_attempts, version = "s3://bucket/key", "bucket", "key", 1, None
transfer = member.begin([Source()])
taken = []
for place in range(3):
    member.flush()
    taken.append(bytes(transfer.take(place)[:8]))
member.check_held()
transfer.close()
member.leave()
print(taken == [(index * size // 8).to_bytes(8, "little") for index in (1, 2, 3)], member.stats.bytes)
"""


def test_rank_in_another_process_takes_the_same_memory(
    lead: Any, source: ServedSource, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpreader.pool.hosts.server._GATHER_S", 50.0)  # the process has to start
    leader: Leader = lead(2)
    packed = pickle.dumps((leader.share._replace(place=1), PART)).hex()
    process = subprocess.Popen([sys.executable, "-c", MEMBER, packed], stdout=subprocess.PIPE, text=True)
    take_all(leader.server, (0, 1, 2), source, data)
    out, _ = process.communicate(timeout=30)
    assert out == f"True {4 * PART}\n"
    assert process.returncode == 0
    assert leader.is_over.wait(30)


# -- limits and forks


def test_member_without_descriptors_reads_by_itself(
    lead: Any, source: ServedSource, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(fd: int) -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    leader: Leader = lead(2)
    with monkeypatch.context() as patched:
        patched.setattr("mpreader.pool.hosts.member.make_selector", refused)
        with pytest.raises(HostLost, match="Too many open files"):
            leader.member(1, (0,))
    check_leader_goes_on(leader, source, data)


def test_leader_without_threads_reads_by_itself(lead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refused)
        with pytest.raises(PoolError, match="can't start new thread"):
            lead(2)


def test_forked_child_says_nothing_in_the_name_of_its_parent(source: ServedSource) -> None:
    listener = Listener()
    share = HostShare(HostOffer("host", listener.address, listener.token), 1, 2)
    with ThreadPoolExecutor(1) as threads, contextlib.closing(listener):
        joining = threads.submit(HostMember, share, (0,))
        listener.socket.setblocking(True)
        connection, _ = listener.socket.accept()
        assert connection.recv(TOKEN_BYTES) == listener.token
        leader, board = Channel(connection), Board.create(2, 0)
        leader.send(Joined(ReadId(1, 1), None, (slot_read_of(0),), 1, 2, 1 << 20, (0,)), board.fd)
        member = joining.result(30)
        transfer = member.begin([source])
        fd = open_shared_memory(PART)
        fill(fd, PART)
        leader.send(MapSegment(1, PART), fd)
        leader.send(SlotArrived(transfer.read, 0, 7, 1, 0))
        view = transfer.take(0)
        leader.receive()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                del view
                member.leave()
                listener.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert leader.receive() == []
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(listener.address)
        del view
        member.leave()
        assert [message for message, _ in leader.receive()] == [GiveBack(7)]
        leader.close()
        board.close()
        os.close(fd)


# -- who must not take part


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"x",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 32,
        b"\0" * 32 + struct.pack("<IB", 5, 0) + b"12345",
        b"x" * 10_000,
    ],
    ids=["nothing", "a part", "HTTP", "another token", "a message", "much"],
)
def test_process_that_does_not_know_the_token_gets_nothing(
    lead: Any, source: ServedSource, data: bytes, said: bytes
) -> None:
    leader: Leader = lead(2)
    with leader.connect() as stranger, leader.connect() as silent:
        stranger.sendall(said)
        if len(said) >= 32 or not said:
            if not said:
                stranger.shutdown(socket.SHUT_WR)
            assert received(stranger) == b""
        check_leader_goes_on(leader, source, data)
        assert received(stranger) == b""
        assert received(silent) == b""


def received(connection: socket.socket) -> bytes:
    """Returns all that the other end says until it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):  # it has closed without having heard all
        while more := connection.recv(1 << 16):
            data += more
    return data


STRANGER: Final = f"""
import os, pickle, socket, sys

share = pickle.loads(bytes.fromhex(sys.argv[1]))
from mpreader.pool.hosts.channel import Channel
from mpreader.pool.hosts.messages import Join
os.setgid({OTHER_USER})
os.setuid({OTHER_USER})
connection = socket.socket(socket.AF_UNIX)
connection.settimeout(30)
connection.connect(share.leader.address)
try:
    connection.sendall(share.leader.token)
    Channel(connection.dup()).send(Join((0,)))
    connection.setblocking(True)
    print(connection.recv(100))
except (BrokenPipeError, ConnectionResetError):
    print(b"")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_gets_nothing_though_he_knows_the_token(lead: Any, source: ServedSource, data: bytes) -> None:
    leader: Leader = lead(2)
    command = [sys.executable, "-c", STRANGER, pickle.dumps(leader.share).hex()]
    stranger = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    check_leader_goes_on(leader, source, data)
    assert stranger.communicate(timeout=30)[0] in ("b''\n", ""), "refused, or came too late"


LEADER: Final = f"""
import os, pickle, sys
from mpreader.pool.hosts.identity import TOKEN_BYTES, HostOffer, HostShare, Listener

os.setgid({OTHER_USER})
os.setuid({OTHER_USER})
listener = Listener()
print(pickle.dumps(HostShare(HostOffer("host", listener.address, listener.token), 1, 2)).hex(), flush=True)
listener.socket.setblocking(True)
connection, _ = listener.socket.accept()
print(connection.recv(100), flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_leader_of_another_user_is_told_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        share = pickle.loads(bytes.fromhex(process.stdout.readline()))
        with pytest.raises(HostLost, match="another user"):
            HostMember(share, (0,))
        assert process.stdout.readline() == "b''\n"


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<IB", 5, 0) + b"12345",
        struct.pack("<IB", (1 << 32) - 1, 0),
        struct.pack("<IB", 5, 1) + b"12345",
        b"1234567",
        *(
            struct.pack("<IB", len(pickle.dumps(message)), 0) + pickle.dumps(message)
            for message in ("no message", None)
        ),
    ],
    ids=["no pickle", "long", "no descriptor", "short", "a text", "None"],
)
def test_rank_that_says_what_makes_no_sense_is_left_out(
    lead: Any, source: ServedSource, data: bytes, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    leader: Leader = lead(2)
    with leader.connect() as broken:
        broken.sendall(leader.listener.token + garbage)
        broken.shutdown(socket.SHUT_WR)
        assert received(broken) == b""
        check_leader_goes_on(leader, source, data)


def test_rank_that_comes_too_late_reads_by_itself(
    lead: Any, source: ServedSource, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpreader.pool.hosts.server._GATHER_S", 0.0)
    leader: Leader = lead(3)
    leader.server.joined()
    assert leader.server.joined_ranks == 1
    with pytest.raises(HostLost, match="can't be reached"):
        leader.member(1, (0,))
    take_all(leader.server, (0, 1, 2), source, data)
    assert leader.is_over.wait(30)


def test_read_that_can_not_begin_has_no_ranks_when_it_ends(lead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a line in the log would say that ranks have loaded together."""

    def refuse(*_: object) -> None:
        raise PlanError("not this one")

    monkeypatch.setattr(Leader, "_plan", refuse)
    leader: Leader = lead(1)
    with pytest.raises(PoolError, match="not this one"):
        leader.server.joined()
    assert leader.is_over.wait(30)
    assert leader.ended == [(PoolStats(), 0)]


def test_listener_is_reached_by_its_address_and_has_a_token_of_its_own() -> None:
    first, second = Listener(), Listener()
    try:
        assert first.address[:1] == b"\0", "a name that is no file"
        assert first.address != second.address
        assert first.token != second.token
        assert len(first.token) == TOKEN_BYTES
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(first.address)
        first.close()
        first.close()
        with socket.socket(socket.AF_UNIX) as caller, pytest.raises(ConnectionRefusedError):
            caller.connect(first.address)
    finally:
        first.close()
        second.close()
