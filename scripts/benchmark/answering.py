"""Worker process for measuring the coordinator: it receives nothing, and reports every part as received at once.

coordinator.py has the pool start it in place of a real worker.
"""

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
            os.close(fds[0])  # of shared memory into which nothing will be received
        elif isinstance(message, Fetch):
            # 0.05 s, as if the part had been received: the coordinator adapts the number of connections to this time.
            sock.send(pickle.dumps(Fetched(message.part, 0.05, 0.0)))
