"""Start of a worker in a frozen program: what ``multiprocessing.freeze_support()`` is given to run.

A frozen program has no interpreter that could be started with code of ours. It is started once more instead, with the
arguments that multiprocessing gives its own processes. ``freeze_support()``, which such a program calls first of all,
reads two pickled objects from the pipe that the arguments name: facts to prepare itself by, and a process object, whose
``_bootstrap`` it calls. Ours runs a worker.

The coordinator writes them; nothing but this module knows multiprocessing's conventions.
"""

from __future__ import annotations

import pickle

from mpreader.pool.worker.main import main

__all__ = ["FrozenStart", "arguments_for", "pickled_start"]


class FrozenStart:
    """Stands in for multiprocessing's process object.

    Args:
        arguments: Arguments of :func:`mpreader.pool.worker.main.main`.
    """

    def __init__(self, arguments: tuple[float, ...]) -> None:
        self.arguments = arguments

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:  # noqa: ARG002  # multiprocessing passes it
        main(*self.arguments)  # type: ignore[arg-type]  # descriptor, process id and connections are whole numbers
        return 0


def arguments_for(pipe: int) -> list[str]:
    """Return the arguments that make ``freeze_support()`` read from the descriptor ``pipe``."""
    return ["--multiprocessing-fork", "tracker_fd=None", f"pipe_handle={pipe}"]


def pickled_start(arguments: tuple[float, ...]) -> bytes:
    """Return what ``freeze_support()`` is to read: no facts to prepare by, and the worker."""
    return pickle.dumps({}) + pickle.dumps(FrozenStart(arguments))
