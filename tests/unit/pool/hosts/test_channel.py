"""Messages and descriptors over a socket that takes them piece by piece, is full, or is closed in the middle."""

from __future__ import annotations

import os
import pickle
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpreader.pool.hosts.channel import Channel, ChannelClosed

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    channels = [Channel(end) for end in socket.socketpair()]
    yield channels[0], channels[1]
    for channel in channels:
        channel.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """A channel whose other end the test writes byte by byte."""
    end, other = socket.socketpair()
    channel = Channel(other)
    yield end, channel
    end.close()
    channel.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(b"shared")
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_messages_come_whole_and_in_order_though_the_socket_is_full(pair: Pair) -> None:
    sender, receiver = pair
    sent = [(number, b"x" * size) for number, size in enumerate([0, 10, 3_000_000, 7, 500_000])]
    for message in sent:
        assert sender.send(message)
    assert sender.has_unsent, "more than the socket holds was sent, and nobody was waited for"
    received: list[object] = []
    while len(received) < len(sent):
        received += [message for message, _ in receiver.receive()]
        assert sender.flush()
    assert received == sent
    assert not sender.has_unsent


def test_each_descriptor_comes_with_its_message(pair: Pair, file: int) -> None:
    sender, receiver = pair
    for number in range(300):
        sender.send((number, b"x" * (number * 100)), file if number % 3 == 0 else None)
    received = 0
    while received < 300:
        sender.flush()
        for message, fd in receiver.receive():
            assert isinstance(message, tuple)
            assert message[0] == received
            assert (fd is not None) == (received % 3 == 0)
            if fd is not None:
                assert os.pread(fd, 10, 0) == b"shared"
                assert not os.get_inheritable(fd)
                os.close(fd)
            received += 1


def test_descriptor_may_be_closed_by_the_sender_before_it_is_sent(pair: Pair, file: int) -> None:
    sender, receiver = pair
    sender.send(b"x" * 3_000_000)
    copied = os.dup(file)
    sender.send("descriptor", copied)
    os.close(copied)
    received: list[tuple[object, int | None]] = []
    while len(received) < 2:
        received += receiver.receive()
        sender.flush()
    message, fd = received[1]
    assert message == "descriptor"
    assert fd is not None
    assert os.pread(fd, 10, 0) == b"shared"
    os.close(fd)


def test_descriptor_for_which_the_process_has_no_room_is_missed(pair: Pair, file: int) -> None:
    sender, receiver = pair
    sender.send("descriptor", file)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(file)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        with pytest.raises(ChannelClosed, match="ulimit -n"):
            receiver.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_message_that_comes_byte_by_byte_is_heard_when_it_is_whole(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    data = pickle.dumps("message")
    for byte in struct.pack("<IB", len(data), 0) + data[:-1]:
        end.send(bytes([byte]))
        assert channel.receive() == []
    end.send(data[-1:] + struct.pack("<IB", len(data), 0))
    assert channel.receive() == [("message", None)]
    end.send(data)
    assert channel.receive() == [("message", None)]


@pytest.mark.parametrize("sent", [0, 1, 5, 12])
def test_end_of_the_other_process_is_told_once_what_it_has_said_is_heard(
    raw: tuple[socket.socket, Channel], sent: int
) -> None:
    end, channel = raw
    data = pickle.dumps("message")
    whole = struct.pack("<IB", len(data), 0) + data
    end.send(whole + whole[:sent])
    end.close()
    assert channel.receive() == [("message", None)]
    with pytest.raises(ChannelClosed, match="in the middle" if sent else "has closed"):
        channel.receive()


def test_send_to_a_process_that_is_gone_says_so(pair: Pair) -> None:
    sender, receiver = pair
    receiver.close()
    assert not sender.send("message")
    assert not sender.flush()
    sender.close()
    assert not sender.send("message")


def test_impossible_message_ends_the_channel_before_memory_is_taken_for_it(raw: tuple[socket.socket, Channel]) -> None:
    end, channel = raw
    end.send(struct.pack("<IB", (1 << 32) - 1, 0))
    with pytest.raises(ChannelClosed, match="4294967295"):
        channel.receive()


def test_close_lets_go_of_descriptors_that_were_not_sent_or_not_heard(pair: Pair, file: int) -> None:
    sender, receiver = pair
    before = len(os.listdir("/proc/self/fd"))
    sender.send("heard in part", file)
    sender.send(b"x" * 3_000_000)
    sender.send("not sent", file)
    receiver._fds.extend([os.dup(file)])
    sender.close()
    receiver.close()
    sender.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 2
    assert sender.fd == -1


def test_threads_may_send_at_one_time(pair: Pair) -> None:
    sender, receiver = pair
    sent = [[(thread, number) for number in range(500)] for thread in range(4)]
    threads = [threading.Thread(target=lambda part=part: [sender.send(one) for one in part]) for part in sent]
    for thread in threads:
        thread.start()
    received: list[object] = []
    while len(received) < 2000:
        received += [message for message, _ in receiver.receive()]
        sender.flush()
    for thread in threads:
        thread.join()
    for part in sent:
        assert [one for one in received if one in set(part)] == part


def test_message_may_be_sent_in_the_middle_of_another_by_the_same_thread(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As by a garbage collection that closes a transfer which was dropped.
    sender, receiver = pair
    kernel_send_fds = socket.send_fds
    interruptions = iter(["second", "third"])

    def interrupted(*arguments: Any) -> int:
        for message in interruptions:
            assert sender.send(message)
        return kernel_send_fds(*arguments)

    monkeypatch.setattr(socket, "send_fds", interrupted)
    assert sender.send("first", sender.fd)
    [first, *others] = receiver.receive() + receiver.receive()
    assert (first[0], *others) == ("first", ("second", None), ("third", None))
    assert first[1] is not None
    os.close(first[1])


def test_descriptor_that_was_lost_is_not_replaced_by_the_next_one(
    raw: tuple[socket.socket, Channel], file: int
) -> None:
    end, channel = raw
    message = pickle.dumps("long")
    framed = struct.pack("<IB", len(message), 1) + message
    socket.send_fds(end, [framed[:6]], [file])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(ChannelClosed, match="ulimit -n"):
            channel.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
