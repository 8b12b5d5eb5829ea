"""Worker process for measuring the coordinator: it receives nothing, and reports every part as received at once."""

from __future__ import annotations

import os
import pickle
import socket

from mpreader.pool.worker.messages import Fetch, Fetched, MapSegment, Ready


def answer_at_once(fd: int, *_: object) -> None:
    """Run as a worker on the socket ``fd``; the other arguments are those of a real worker, and not needed."""
    sock = socket.socket(fileno=fd)
    sock.send(pickle.dumps(Ready()))
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 1)
        if not data:
            os._exit(0)
        message = pickle.loads(data)
        if isinstance(message, MapSegment):
            os.close(fds[0])
        elif isinstance(message, Fetch):
            sock.send(pickle.dumps(Fetched(message.part, 0.05, 0.0)))
