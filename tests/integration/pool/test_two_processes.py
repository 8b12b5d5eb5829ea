"""A caller and its coordinator in two processes, which have pickled messages and shared memory in common."""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader.config import KiB
from mpreader.errors import ObjectMissing, TransportError
from mpreader.pool.caller import Caller
from mpreader.pool.requests import GiveBack, SlotArrived, SlotRead, SlotTaken
from mpreader.pool.transfer import Transfer
from mpreader.pool.worker.messages import MapSegment
from mpreader.ranges import Part
from tests.integration.pool.coordinator_process import CALLER, MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from mpreader.pool.source import Source
    from mpreader.testing import FaultServer

pytestmark = pytest.mark.timeout(60)

PART = 64 * KiB
PROGRAM = Path(__file__).with_name("coordinator_process.py")


class ReceivedMemory:
    """A segment whose descriptor came over a socket. See :class:`mpreader.pool.requests.SegmentMemory`."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.map = mmap.mmap(fd, size)
        os.close(fd)


class RemoteCoordinator:
    """The coordinator in the other process, and the caller in this one.

    Attributes:
        caller: The caller.
        sent: Messages to the coordinator.
        received: Messages from it.
        reserved_bytes: Shared memory that the coordinator had reserved at most; after ``close``.
    """

    def __init__(self, max_memory: int) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(PROGRAM), str(theirs.fileno()), str(max_memory), str(PART)]
        self._process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdout=subprocess.PIPE, text=True)
        theirs.close()
        self.sent: list[object] = []
        self.received: list[object] = []
        self.reserved_bytes = 0
        self.caller = Caller(CALLER, self.tell)
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def tell(self, message: object) -> None:
        self.sent.append(message)
        self._sock.send(pickle.dumps(message))

    def open(self, source: Source, slot_reads: list[SlotRead]) -> Transfer:
        transfer, message = self.caller.open([source], slot_reads)
        self.tell(message)
        return transfer

    def give_back_ended_leases(self) -> None:
        """Say which views are gone; in one process the coordinator looks by itself."""
        for message in self.caller.collect():
            self.tell(message)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)
        out, _ = self._process.communicate(timeout=30)
        self._thread.join()
        self._sock.close()
        pid, reserved = map(int, out.split())
        assert pid not in (os.getpid(), 0)
        self.reserved_bytes = reserved

    def _receive(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_MESSAGE_BYTES, 1)
            if not data:
                return
            message = pickle.loads(data)
            self.received.append(message)
            self.caller.post(message, ReceivedMemory(fds[0], message.size) if isinstance(message, MapSegment) else None)


@pytest.fixture
def remote() -> Iterator[RemoteCoordinator]:
    remote = RemoteCoordinator(max_memory=4 * PART)
    yield remote
    remote.close()


def test_read_of_many_parts_goes_through_two_processes(source: Any, data: bytes) -> None:
    remote = RemoteCoordinator(max_memory=4 * PART)
    slot_reads = [SlotRead(0, PART, (Part(start, start + PART),)) for start in range(0, 24 * PART, PART)]
    two_parts = (Part(0, 1000), Part(5000, 6000, slot_offset=1024))
    transfer = remote.open(source, [*slot_reads, SlotRead(0, 2024, two_parts)])
    for index in range(24):
        view = transfer.take(index)
        assert view == data[index * PART : (index + 1) * PART]
        del view
        remote.give_back_ended_leases()
    scattered = transfer.take(24)
    assert bytes(scattered[:1000]) == data[:1000]
    assert bytes(scattered[1024:]) == data[5000:6000]
    transfer.close()
    del scattered
    remote.give_back_ended_leases()
    remote.close()
    assert remote.reserved_bytes <= 4 * PART, "24 slots of memory that has room for 4"
    assert transfer.stats().requests == 26
    arrived = Counter(message.lease for message in remote.received if isinstance(message, SlotArrived))
    assert Counter(message.lease for message in remote.sent if isinstance(message, GiveBack)) == arrived
    assert sum(isinstance(message, SlotTaken) for message in remote.sent) == 25
    assert len({type(message) for message in (*remote.sent, *remote.received)}) >= 8


def test_error_of_a_source_comes_back_through_two_processes(remote: RemoteCoordinator, server: FaultServer) -> None:
    class Missing:
        bucket, key, uri, max_attempts = "bucket", "key", "s3://bucket/key", 1
        version = None

        def open(self) -> Any:
            raise ObjectMissing("there is no such key", bucket="bucket", key="key")

        def route(self) -> Any:
            raise AssertionError("nobody may ask: it was not opened")

    transfer = remote.open(Missing(), [SlotRead(0, 1, (Part(0, 1),))])
    with pytest.raises(TransportError) as caught:
        transfer.take(0)
    assert type(caught.value) is ObjectMissing
    assert (caught.value.bucket, caught.value.key) == ("bucket", "key")
    transfer.close()
