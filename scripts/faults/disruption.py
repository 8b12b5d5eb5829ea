"""Disruptions of the storm: workers are killed or stopped, and objects are overwritten, while a read is under way.

:mod:`scripts.faults.storm` runs one for each read. It chooses and does the disruptions; it judges no result.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mpreader.testing.fault_server import FaultServer
from scripts.faults.plans import Versions

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Disruption"]

_POLL_S: Final = 0.002


class Disruption:
    """A thread that disrupts a read when the server has got certain numbers of requests. A context manager.

    Args:
        server: The server that is read from.
        rng: Chooses the disruptions and their times; None: there are none.
        objects: The objects that may be overwritten.

    Attributes:
        kills: Workers that were killed or stopped.
    """

    def __init__(self, server: FaultServer, rng: random.Random | None, objects: Sequence[Versions]) -> None:
        self.kills = 0
        self._server = server
        self._objects = objects
        self._is_over = threading.Event()
        # Chosen here, not in the thread: the storm's generator must give the same numbers each time a seed is repeated.
        self._actions = [] if rng is None else self._choose_actions(rng)
        self._thread = threading.Thread(target=self._run, daemon=True, name="mpreader-disruption")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _choose_actions(self, rng: random.Random) -> list[tuple[int, Callable[[], None]]]:
        """Choose actions, each with the number of the server's requests after which it is due."""
        # Requests are counted, not seconds, so that a schedule is the same on a slow machine.
        actions, requests = [], len(self._server.requests)
        for _ in range(rng.choice((0, 1, 1, 2))):
            requests += rng.randrange(1, 8)
            actions.append((requests, self._choose_action(rng)))
        return actions

    def _choose_action(self, rng: random.Random) -> Callable[[], None]:
        if self._objects and rng.random() < 0.3:
            versions = rng.choice(self._objects)
            content = rng.randbytes(versions.size)
            return lambda: self._overwrite(versions, content)
        # Which worker that is, of those that run then, is decided when the time comes.
        signum, number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)), rng.randrange(1 << 16)
        return lambda: self._signal_worker(signum, number)

    def _run(self) -> None:
        for requests, act in self._actions:
            while len(self._server.requests) < requests:
                if self._is_over.wait(_POLL_S):
                    return  # the read has ended with fewer requests
            act()

    def _overwrite(self, versions: Versions, content: bytes) -> None:
        # Listed before it is served: else a read of the new bytes could be judged wrong, being of no known version.
        versions.contents.append(content)
        self._server.put(versions.path, content, versions.headers(content))

    def _signal_worker(self, signum: int, number: int) -> None:
        pids = _worker_pids()
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[number % len(pids)], signum)
                self.kills += 1


def _worker_pids() -> list[int]:
    """Process ids of this process's workers. Its other children, such as samplers, are left alone."""
    children: list[str] = []
    for task in Path("/proc/self/task").iterdir():  # a child belongs to the thread that started it
        with contextlib.suppress(OSError):
            children += (task / "children").read_text().split()
    return sorted({int(pid) for pid in children if b"mpreader.pool.worker.main" in _command(pid)})


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended meanwhile
