"""The least that a fetch costs: a handwritten GET, and the kernel's copy into shared memory, in as many processes.

No checks, no retries, no order: what a library takes beyond this is its own.
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

__all__ = ["Floor"]

_ORDER: Final = struct.Struct("<QQQQ")  # number of the part, start, end, offset in memory; pipes move it in one piece
_DONE: Final = struct.Struct("<Q")
_HEAD_BYTES: Final = 2048
Parts = list[tuple[str, int, int]]


class Floor:
    """As many processes and connections as mpreader's pool has by default."""

    def __init__(self, endpoint_url: str) -> None:
        address = urlsplit(endpoint_url)
        self._address = (address.hostname or "", address.port or 80)
        self._sizes = size_pool(PoolConfig(), S3ClientConfig(), Host.now())
        self._slots = self._sizes.workers * self._sizes.connections_per_worker
        self._warm = mmap.mmap(-1, self._slots * PART_BYTES)
        self._warm.write(b"\1" * len(self._warm))
        self._crew: _Crew | None = None

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        return self._keep(list(parts_of(sizes)))

    def scatter(self, ranges: Mapping[str, Sequence[tuple[int, int]]]) -> list[Piece]:
        return self._keep([(key, start, end) for key, pairs in ranges.items() for start, end in pairs])

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        parts = list(parts_of(sizes))
        if self._crew is None:
            self._crew = _Crew(self._address, self._sizes, self._warm, [key for key, _, _ in parts])
        view = memoryview(self._warm)
        free, under_way = list(range(self._slots)), dict[int, int]()
        for number in range(len(parts)):
            slot = free.pop() if free else self._let_go(parts, under_way, view, take)
            under_way[number] = slot
            self._crew.order(number, *parts[number][1:], slot * PART_BYTES)
        while under_way:
            self._let_go(parts, under_way, view, take)

    def close(self) -> None:
        if self._crew is not None:
            self._crew.close()

    def _keep(self, parts: Parts) -> list[Piece]:
        offsets = list(itertools.accumulate((end - start for _, start, end in parts), initial=0))
        memory = mmap.mmap(-1, offsets[-1])
        crew = _Crew(self._address, self._sizes, memory, [key for key, _, _ in parts])
        for number, (_, start, end) in enumerate(parts):
            crew.order(number, start, end, offsets[number])
        for _ in parts:
            crew.done()
        crew.close()
        view = memoryview(memory)
        return [
            Piece(key, start, view[offset : offset + end - start])
            for (key, start, end), offset in zip(parts, offsets, strict=False)
        ]

    def _let_go(self, parts: Parts, under_way: dict[int, int], view: memoryview, take: Take) -> int:
        assert self._crew is not None
        number = self._crew.done()
        slot = under_way.pop(number)
        key, start, end = parts[number]
        take(Piece(key, start, view[slot * PART_BYTES : slot * PART_BYTES + end - start]))
        return slot


class _Crew:
    """Processes that take orders from one pipe and say on another what is done."""

    def __init__(self, address: tuple[str, int], sizes: PoolSizes, memory: mmap.mmap, keys: Sequence[str]) -> None:
        orders, self._orders = os.pipe()
        self._done, done = os.pipe()
        self._pids = []
        for _ in range(sizes.workers):
            pid = os.fork()
            if pid == 0:
                os.close(self._orders)
                _work(address, sizes.connections_per_worker, memoryview(memory), keys, orders, done)
            self._pids.append(pid)
        os.close(orders)
        os.close(done)

    def order(self, number: int, start: int, end: int, offset: int) -> None:
        os.write(self._orders, _ORDER.pack(number, start, end, offset))

    def done(self) -> int:
        """Number of a part that has arrived; waits for it."""
        said = os.read(self._done, _DONE.size)
        if not said:
            raise EOFError("the processes have ended")
        return int(_DONE.unpack(said)[0])

    def close(self) -> None:
        os.close(self._orders)
        for pid in self._pids:
            os.waitpid(pid, 0)
        os.close(self._done)


def _work(
    address: tuple[str, int], connections: int, memory: memoryview, keys: Sequence[str], orders: int, done: int
) -> None:
    def serve() -> None:
        with socket.create_connection(address) as connection:
            while order := os.read(orders, _ORDER.size):
                number, start, end, offset = _ORDER.unpack(order)
                _receive(connection, keys[number], start, end, memory[offset : offset + end - start])
                os.write(done, _DONE.pack(number))

    threads = [threading.Thread(target=serve) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


def _receive(connection: socket.socket, key: str, start: int, end: int, memory: memoryview) -> None:
    request = f"GET /{BUCKET}/{key} HTTP/1.1\r\nHost: localhost\r\nRange: bytes={start}-{end - 1}\r\n\r\n"
    connection.sendall(request.encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(_HEAD_BYTES)
    body = answer.partition(b"\r\n\r\n")[2]
    memory[: len(body)] = body
    if len(body) < len(memory):
        connection.recv_into(memory[len(body) :], 0, socket.MSG_WAITALL)
