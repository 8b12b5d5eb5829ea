"""Lower bound of a fetch: handwritten GETs, and the kernel's copy into shared memory, in as many processes.

It checks nothing, retries nothing and keeps no order. The seconds that a library needs beyond this are its own; those
below it are the network's, the kernel's and the server's.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from checkpoints import BUCKET
from fetches import PART_BYTES, Piece, Take, parts_of

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.host import Host
from mpreader.pool.sizing import PoolSizes, size_pool

__all__ = ["Floor", "Processes", "Threads", "floor_sizes"]

_REQUEST: Final = struct.Struct("<QQQQ")  # number of the part, start, end, offset in memory
_DONE: Final = struct.Struct("<Q")  # number of the part. Writes of so few bytes to a pipe are never mixed or split
_HEAD_BYTES: Final = 2048
Parts = list[tuple[str, int, int]]


def floor_sizes() -> PoolSizes:
    """Processes and connections of mpreader's pool by default."""
    return size_pool(PoolConfig(), S3ClientConfig(), Host.now())


class Floor:
    """As many processes and connections as mpreader's pool has by default."""

    def __init__(self, endpoint_url: str) -> None:
        address = urlsplit(endpoint_url)
        self._address = (address.hostname or "", address.port or 80)
        self._sizes = floor_sizes()
        self._slots = self._sizes.workers * self._sizes.connections_per_worker
        self._warm = mmap.mmap(-1, self._slots * PART_BYTES)
        self._warm.write(b"\1" * len(self._warm))  # touches every page, for which no run shall pay
        self._processes: Processes | None = None

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return self._keep(list(parts_of(sizes)))

    def scatter(self, ranges: Mapping[str, Sequence[tuple[int, int]]]) -> list[Piece]:
        return self._keep([(key, start, end) for key, pairs in ranges.items() for start, end in pairs])

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        parts = list(parts_of(sizes))
        # Started in the first run, as a library's processes; the second one finds them connected.
        if self._processes is None:
            self._processes = Processes(self._address, self._sizes, self._warm, [key for key, _, _ in parts])
        view = memoryview(self._warm)
        free, under_way = list(range(self._slots)), dict[int, int]()
        # As many parts under way as there are slots; then each part that arrives frees the slot of the next one.
        for number in range(len(parts)):
            slot = free.pop() if free else self._take_one(parts, under_way, view, take)
            under_way[number] = slot
            self._processes.request(number, *parts[number][1:], slot * PART_BYTES)
        while under_way:
            self._take_one(parts, under_way, view, take)

    def close(self) -> None:
        if self._processes is not None:
            self._processes.close()

    def _keep(self, parts: Parts) -> list[Piece]:
        offsets = list(itertools.accumulate((end - start for _, start, end in parts), initial=0))
        # New memory, since the objects are kept, and new processes, since only a fork inherits its mapping.
        memory = mmap.mmap(-1, offsets[-1])
        processes = Processes(self._address, self._sizes, memory, [key for key, _, _ in parts])
        for number, (_, start, end) in enumerate(parts):
            processes.request(number, start, end, offsets[number])
        for _ in parts:
            processes.done()
        processes.close()
        view = memoryview(memory)
        return [
            Piece(key, start, view[offset : offset + end - start])
            for (key, start, end), offset in zip(parts, offsets, strict=False)
        ]

    def _take_one(self, parts: Parts, under_way: dict[int, int], view: memoryview, take: Take) -> int:
        assert self._processes is not None
        number = self._processes.done()
        slot = under_way.pop(number)
        key, start, end = parts[number]
        take(Piece(key, start, view[slot * PART_BYTES : slot * PART_BYTES + end - start]))
        return slot


class _Receivers:
    """Receivers that take requests for parts from one pipe, and report received parts on another."""

    def __init__(self) -> None:
        self._taken, self._requests = os.pipe()
        self._done, self._reported = os.pipe()

    def request(self, number: int, start: int, end: int, offset: int) -> None:
        os.write(self._requests, _REQUEST.pack(number, start, end, offset))

    def done(self) -> int:
        """Number of a part that has arrived; waits for it."""
        said = os.read(self._done, _DONE.size)
        if not said:
            raise EOFError("the receivers have ended")
        return int(_DONE.unpack(said)[0])


class Processes(_Receivers):
    """Receivers in processes, into shared memory."""

    def __init__(self, address: tuple[str, int], sizes: PoolSizes, memory: mmap.mmap, keys: Sequence[str]) -> None:
        super().__init__()
        self._pids = []
        for _ in range(sizes.workers):
            pid = os.fork()
            if pid == 0:
                # The parent's end: while a child held it, the pipe would never end, and so no child either.
                os.close(self._requests)
                for thread in _threads(
                    address, sizes.connections_per_worker, memoryview(memory), keys, self._taken, self._reported
                ):
                    thread.join()
                os._exit(0)  # not the usual end, which would run what the parent has registered for its own
            self._pids.append(pid)
        os.close(self._taken)
        os.close(self._reported)

    def close(self) -> None:
        os.close(self._requests)
        for pid in self._pids:
            os.waitpid(pid, 0)
        os.close(self._done)


class Threads(_Receivers):
    """Receivers in threads of this process, as many as :class:`Processes` has connections, into its own memory."""

    def __init__(self, address: tuple[str, int], sizes: PoolSizes, memory: mmap.mmap, keys: Sequence[str]) -> None:
        super().__init__()
        connections = sizes.workers * sizes.connections_per_worker
        self._threads = _threads(address, connections, memoryview(memory), keys, self._taken, self._reported)

    def close(self) -> None:
        os.close(self._requests)
        for thread in self._threads:
            thread.join()
        for end in (self._taken, self._reported, self._done):
            os.close(end)


def _threads(
    address: tuple[str, int], connections: int, memory: memoryview, keys: Sequence[str], requests: int, done: int
) -> list[threading.Thread]:
    """Start a thread for each connection, which serves requests until the pipe ends."""

    def serve() -> None:
        with socket.create_connection(address) as connection:
            while request := os.read(requests, _REQUEST.size):
                number, start, end, offset = _REQUEST.unpack(request)
                _receive(connection, keys[number], start, end, memory[offset : offset + end - start])
                os.write(done, _DONE.pack(number))

    threads = [threading.Thread(target=serve) for _ in range(connections)]
    for thread in threads:
        thread.start()
    return threads


def _receive(connection: socket.socket, key: str, start: int, end: int, memory: memoryview) -> None:
    request = f"GET /{BUCKET}/{key} HTTP/1.1\r\nHost: localhost\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
    connection.sendall(request.encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(_HEAD_BYTES)
    # The first bytes of the body may have come with the head.
    body = answer.partition(b"\r\n\r\n")[2]
    memory[: len(body)] = body
    if len(body) < len(memory):
        connection.recv_into(memory[len(body) :], 0, socket.MSG_WAITALL)
