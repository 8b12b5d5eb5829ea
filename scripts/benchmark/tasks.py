"""Task of a measurement: the work that its process does twice, and the job that describes it.

measure.py runs tasks; fetches.py and loads.py hold one kind each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from servers import Site

__all__ = ["Job", "Task", "WrongBytes", "announced"]


def announced(rounds: range) -> Iterator[int]:
    """Yield the numbers of rounds; at each one, print it and the seconds since the first one."""
    started = time.monotonic()
    for number in rounds:
        print(f"[{time.monotonic() - started:5.0f} s] round {number} of {rounds[-1]}", flush=True)
        yield number


class WrongBytes(Exception):
    """A contender delivered other bytes than those that are stored."""


@dataclass(frozen=True, slots=True)
class Job:
    """One cell to be measured.

    Attributes:
        contender: Name of the contender.
        workload: Name of the workload.
        fresh: True: targets are untouched memory.
        site: The server.
        data: The folder that the servers serve.
        checking: True: bytes are compared and memory is sampled; the times of such a run are not used.
        workers: Worker processes of mpreader's fetcher; None: its default.
        connections: Connections of each; None: its default.
        cutting: False: mpreader cuts no slow requests.
    """

    contender: str
    workload: str
    fresh: bool
    site: Site
    data: Path
    checking: bool
    workers: int | None = None
    connections: int | None = None
    cutting: bool = True


class Task(Protocol):
    """Work that is run twice in one process; libraries are imported when it is made, clients are made by ``run``."""

    @property
    def target_ranges(self) -> list[tuple[int, int]]:
        """Addresses and sizes of memory that is not to be counted."""

    @property
    def cuts(self) -> int:
        """Requests of the last run that mpreader cut, since they were slower than others."""

    def prepare(self) -> None:
        """Forget the run before, make targets ready. Not timed."""

    def run(self) -> None:
        """Do the work that is timed."""

    def check(self) -> None:
        """Compare what has arrived with what is stored.

        Raises:
            WrongBytes: It differs.
        """

    def close(self) -> None:
        """End processes and connections."""
