"""A coordinator in a process of its own, for test_two_processes: its one caller is at the other end of a socket."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
from collections.abc import Sequence

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.host import Host
from mpreader.pool.coordinator.coordinator import Coordinator, Timeouts
from mpreader.pool.requests import ReadId, SegmentMemory
from mpreader.pool.sizing import size_pool

MAX_MESSAGE_BYTES = 1 << 16
CALLER = 7


class RemoteMailbox:
    """Mailbox of a caller in another process. See :class:`mpreader.pool.coordinator.coordinator.Mailbox`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def post(self, message: object, memory: SegmentMemory | None = None) -> None:
        with contextlib.suppress(BrokenPipeError):  # the caller is gone
            socket.send_fds(self._sock, [pickle.dumps(message)], [] if memory is None else [memory.fd])

    def collect(self) -> Sequence[object]:
        return ()  # the caller sends by itself what it has to say


def main(fd: int, max_memory: int, part_size: int) -> None:
    """Serve the caller until its end of the socket closes; then print how much shared memory was reserved."""
    sock = socket.socket(fileno=fd)
    config = PoolConfig(workers=2, connections_per_worker=2, max_memory=max_memory, part_size=part_size)
    timeouts = Timeouts(*(config.value(name) for name in Timeouts._fields))
    coordinator = Coordinator(size_pool(config, S3ClientConfig(), Host.now()), timeouts)
    coordinator.connect(CALLER, RemoteMailbox(sock))
    most_reserved = 0
    while data := sock.recv(MAX_MESSAGE_BYTES):
        message = pickle.loads(data)
        read = getattr(message, "read", None)
        assert read is None or (isinstance(read, ReadId) and read.caller == CALLER)
        coordinator.tell(message)
        most_reserved = max(most_reserved, coordinator.reserved_bytes)
    coordinator.stop()
    print(os.getpid(), most_reserved, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
