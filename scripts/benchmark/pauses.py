"""Pauses of a server: all its processes are stopped for some seconds, twice, while a load is under way."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from measure import Failure
from servers import Site

from mpreader.tools.bench.memory import process_tree

__all__ = ["PAUSES_S", "paused_twice"]

_PAUSE_S: Final = 3.0
_AFTER_REQUESTS: Final = (30, 90)  # a load of 1.2 GB makes 147 or more
PAUSES_S: Final = _PAUSE_S * len(_AFTER_REQUESTS)
_POLL_S: Final = 0.002


@contextlib.contextmanager
def paused_twice(site: Site, pid: int) -> Iterator[None]:
    """Pause the process ``pid`` and its children during the load that the block makes of ``site``.

    Raises:
        Failure: The load was over before the second pause was.
    """
    # A process, since the block forks this one, which must therefore have no threads.
    pauser = multiprocessing.get_context("fork").Process(target=_pause, args=(site.log, site.mark(), pid))
    pauser.start()
    try:
        yield
        pauser.join(PAUSES_S)
        if pauser.exitcode != 0:
            raise Failure("the load made too few requests for two pauses")
    finally:
        pauser.kill()
        pauser.join()
        _signal(pid, signal.SIGCONT)  # also when the load has failed in a pause


def _pause(log: Path, mark: int, pid: int) -> None:
    for number in _AFTER_REQUESTS:
        while _lines_since(log, mark) < number:
            time.sleep(_POLL_S)
        _signal(pid, signal.SIGSTOP)
        time.sleep(_PAUSE_S)
        _signal(pid, signal.SIGCONT)


def _lines_since(log: Path, mark: int) -> int:
    with log.open("rb") as file:
        file.seek(mark)
        return file.read().count(b"\n")


def _signal(pid: int, number: signal.Signals) -> None:
    for each in process_tree(pid):
        os.kill(each, number)
