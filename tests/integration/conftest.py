"""Fixtures of the integration tests: an interpreter for programs; a served source and pools that are closed again."""

from __future__ import annotations

import contextlib
import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from mpreader.config import PoolConfig
from mpreader.pool.pool import Pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.ranges import Part
from mpreader.testing import FaultServer
from tests.integration.warm_interpreter import WarmInterpreter


class ServedSource:
    """An object of a fault server. See :class:`mpreader.pool.source.Source`."""

    bucket = "bucket"
    version = None
    max_attempts = 5

    def __init__(self, server: FaultServer, path: str, data: bytes) -> None:
        self.key = path
        self.uri = f"s3://bucket/{path}"
        self.opened = 0
        self.routes = 0
        self._port = int(server.endpoint_url.rpartition(":")[2])
        self._version = ObjectVersion(len(data), f'"{hashlib.md5(data).hexdigest()}"')

    def open(self) -> ObjectVersion:
        self.opened += 1
        return self._version

    def route(self) -> Route:
        self.routes += 1
        return Route(False, "127.0.0.1", self._port, self.key, (("Host", f"127.0.0.1:{self._port}"),))


class WorkersOf(Protocol):
    """Process ids of the running workers of a process, which itself may have ended."""

    def __call__(self, pid: int) -> list[int]: ...


class MakePool(Protocol):
    """Makes a pool that is closed when the test ends."""

    def __call__(
        self, *, workers: int = 1, connections_per_worker: int = 4, max_memory: int = ..., **settings: float
    ) -> Pool: ...


class CutObject(Protocol):
    """Cuts an object into slot reads of ``size`` bytes, one part each."""

    def __call__(self, size: int, count: int | None = None, start: int = 0) -> list[SlotRead]: ...


@pytest.fixture(scope="session")
def warm_interpreter() -> Iterator[WarmInterpreter]:
    with WarmInterpreter() as interpreter:
        yield interpreter


@pytest.fixture
def workers_of() -> WorkersOf:
    def workers_of(pid: int) -> list[int]:
        start = re.compile(rb"mpreader\.pool\.worker\.main import main; main\(\d+, %d, " % pid)
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if start.search(entry.read_bytes()):  # that of a process which waits to be reaped is empty
                    found.append(int(entry.parent.name))
        return found

    return workers_of


@pytest.fixture
def make_pool() -> Iterator[MakePool]:
    with contextlib.ExitStack() as pools:

        def make(
            *, workers: int = 1, connections_per_worker: int = 4, max_memory: int = 16 << 20, **settings: float
        ) -> Pool:
            config = PoolConfig(workers, connections_per_worker, max_memory, **settings)  # type: ignore[arg-type]
            pool = Pool(config)
            pools.callback(pool.close)
            return pool

        yield make


@pytest.fixture(scope="session")
def data() -> bytes:
    """8 MiB of which every 8 bytes differ."""
    return b"".join(number.to_bytes(8, "little") for number in range(1 << 20))


@pytest.fixture
def server(data: bytes) -> Iterator[FaultServer]:
    with FaultServer({"/object": data}) as server:
        yield server


@pytest.fixture
def source(server: FaultServer, data: bytes) -> ServedSource:
    return ServedSource(server, "/object", data)


@pytest.fixture
def cut_object(source: ServedSource, data: bytes) -> CutObject:
    def cut(size: int, count: int | None = None, start: int = 0) -> list[SlotRead]:
        starts: Sequence[int] = range(start, len(data) - size + 1, size)[:count]
        return [SlotRead(0, size, (Part(start, start + size),)) for start in starts]

    return cut


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of mpreader, named by its first argument, in this process, which may have torch already."""
    from mpreader.cli.main import main

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return run
