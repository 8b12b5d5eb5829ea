"""Fixtures of the fault matrix: fault servers that are closed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import pytest

from mpreader.testing import Fault, FaultServer
from mpreader.testing.response import Content


class Serve(Protocol):
    """Starts a fault server that is closed when the test ends."""

    def __call__(
        self,
        objects: Mapping[str, Content],
        *faults: Fault,
        tls: bool = False,
        bytes_per_s: float | None = None,
    ) -> FaultServer: ...


@pytest.fixture
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries come at once, where it is their number that is tested."""
    monkeypatch.setattr("random.uniform", lambda *_: 0.0)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start fault servers: ``server = serve({"/bucket/key": data}, Fault(FaultKind.RESET, at=(1,)))``."""
    with contextlib.ExitStack() as servers:

        def start(
            objects: Mapping[str, Content], *faults: Fault, tls: bool = False, bytes_per_s: float | None = None
        ) -> FaultServer:
            return servers.enter_context(FaultServer(objects, faults, tls=tls, bytes_per_s=bytes_per_s))

        yield start
