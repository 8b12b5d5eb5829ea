"""Link of a limited rate: passes connections on to a server, and its answers at so many bytes per second in sum.

Run by ranks.py: ``link.py PORT BYTES_PER_S``; prints the port on which it listens. nginx limits each connection by
itself, and a queueing discipline of the kernel needs privileges. The bytes are spliced: they are not copied here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time

_CHUNK_BYTES = 256 * 1024
_BURST_S = 0.01  # of unused time that may be made up for


class _Rate:
    """Times at which bytes may pass."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    def wait(self, nbytes: int) -> None:
        """Wait until so many bytes may pass."""
        with self._lock:
            now = time.monotonic()
            start = max(self._free_s, now - _BURST_S)
            self._free_s = start + nbytes / self._bytes_per_s
        time.sleep(max(0.0, start - now))


def _pass_on(source: socket.socket, target: socket.socket, rate: _Rate | None) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
    with contextlib.suppress(OSError):  # one of the two has closed
        while nbytes := os.splice(source.fileno(), write_end, _CHUNK_BYTES):
            if rate is not None:
                rate.wait(nbytes)
            while nbytes:
                nbytes -= os.splice(read_end, target.fileno(), nbytes)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    os.close(read_end)
    os.close(write_end)


def _serve(client: socket.socket, port: int, rate: _Rate) -> None:
    with client, socket.create_connection(("127.0.0.1", port)) as server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        requests = threading.Thread(target=_pass_on, args=(client, server, None))
        requests.start()
        _pass_on(server, client, rate)
        requests.join()


def _main(port: int, bytes_per_s: float) -> None:
    rate = _Rate(bytes_per_s)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, port, rate), daemon=True).start()


if __name__ == "__main__":
    _main(int(sys.argv[1]), float(sys.argv[2]))
