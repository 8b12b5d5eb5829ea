"""Launcher of ranks: ``python -m mpreader.tools.ranks.launcher LISTENING RANK …``, started by :mod:`job`.

It imports torch, once for all ranks, and is forked for each of them. Its arguments are descriptors: of the socket on
which the ranks find each other, and of each rank's socket to the job. It prints a line for each rank that has ended:
the rank and its exit code, or the negative number of the signal that has ended it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mpreader.tools.ranks.rank import run_rank

__all__: list[str] = []


def _launch(listening: int, channels: Sequence[int]) -> None:
    gc.freeze()  # else a collection in a rank would copy, page by page, all that was imported
    ranks = {}
    for rank in range(len(channels)):
        pid = os.fork()
        if not pid:
            _run(rank, listening, channels)
        ranks[pid] = rank
    for descriptor in (listening, *channels):
        os.close(descriptor)  # else the end of a rank, or of the job, would not be seen at the other end
    while ranks:
        pid, status = os.waitpid(-1, 0)
        with contextlib.suppress(BrokenPipeError):  # the job was killed
            os.write(1, b"%d %d\n" % (ranks.pop(pid), os.waitstatus_to_exitcode(status)))


def _run(rank: int, listening: int, channels: Sequence[int]) -> NoReturn:
    for other, channel in enumerate(channels):
        if other != rank:
            os.close(channel)
    if rank:
        os.close(listening)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo prints there
    run_rank(rank, len(channels), channels[rank], None if rank else listening)


if __name__ == "__main__":
    _launch(int(sys.argv[1]), [int(argument) for argument in sys.argv[2:]])
