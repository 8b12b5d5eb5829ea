"""Interpreter choice: the Python interpreter that workers are started with, and the proof that it is one.

``sys.executable`` need not be an interpreter. In a frozen program (PyInstaller, cx_Freeze, Nuitka) it is the program
itself: started as a worker, it would run as a whole once more, start workers of its own, and so on. In uWSGI and in
programs that embed Python it is the server, a script, or nothing.

So the workers' interpreter is chosen in this order, and with one that is not certain a single worker is started, until
that has proved by its first message that it is the worker, run by our kind of Python::

    multiprocessing.set_executable() names another one than sys.executable ──► that one, and no other
    frozen program ──► the program with multiprocessing's own arguments: freeze_support() runs the worker
    else ──► sys.executable, sys._base_executable, the running executable, Python's installation folders

Certain is an executable of an interpreter's name that runs this very process. Every worker's environment has a mark
(:data:`MARK`): a program that finds it there and wants to start workers was started in place of a worker, and must
fail.

Used by the worker supervisor. This module starts nothing itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path
from typing import Final, NamedTuple

from mpreader.errors import PoolError, WorkerCrashed
from mpreader.pool.worker.messages import Ready, python_name

__all__ = ["MARK", "ROOT", "Interpreter", "InterpreterChoice", "find_interpreter", "require_no_worker"]

MARK: Final = "MPREADER_WORKER_OF"
ROOT: Final = str(Path(__file__).resolve().parents[3])  # what mpreader is imported from

# python3.11, python3.13t, python3.11-dbg, pypy3.10
_NAME: Final = re.compile(r"(python|pypy)[0-9.]*[a-z]{0,3}(-[a-z0-9]+)?")

_FROZEN_HINT: Final = (
    "The program is frozen (PyInstaller, cx_Freeze, Nuitka, …) and its workers are started from itself: call "
    'multiprocessing.freeze_support() as the first line under `if __name__ == "__main__":` (where that does nothing on '
    "Linux, multiprocessing.spawn.freeze_support())"
)


class Interpreter(NamedTuple):
    """An executable that may be able to run a worker.

    Attributes:
        path: Its path.
        is_program: True if it is the frozen program itself, which takes multiprocessing's arguments.
        is_certain: True if it needs no proof.
    """

    path: str
    is_program: bool = False
    is_certain: bool = False


class InterpreterChoice:
    """The interpreters that may run the workers of one coordinator, tried one after the other until one is proved.

    Attributes:
        current: The interpreter to start workers with.
    """

    def __init__(self) -> None:
        self._left = _candidates()
        self._refused: list[str] = []
        # Where there is none, the name says so in the error of its start.
        self.current = next(self._left, None) or Interpreter("python3")

    @property
    def is_proved(self) -> bool:
        """True if any number of workers may be started with the current interpreter."""
        return self.current.is_certain or self.current in _proved

    def fault_of(self, ready: Ready, pid: int) -> str | None:
        """Check the first message of a worker that was started with the current interpreter.

        Args:
            ready: The message.
            pid: Process that was started.

        Returns:
            The reason why this interpreter can't be used; None if it is proved now.
        """
        if ready.pid != pid:
            return "it runs the worker in a process of its own: a script that starts Python must do so by exec"
        if ready.python != python_name():
            return f"it is {ready.python}, and not {python_name()}"
        _proved.add(self.current)
        return None

    def refuse(self, why: str, exitcode: int | None) -> None:
        """Go on to the next interpreter.

        Args:
            why: What was wrong with the current one, in words.
            exitcode: Exit status of its process, if it was started.

        Raises:
            WorkerCrashed: There is none left.
        """
        self._refused.append(f"{self.current.path!r}: {why}")
        following = next(self._left, None)
        if following is not None:
            self.current = following
            return
        hint = (
            _FROZEN_HINT
            if self.current.is_program
            else f"Name the interpreter: multiprocessing.set_executable('/path/to/{_usual_name()}')"
        )
        error = f"worker processes can't start; tried {'; '.join(self._refused)}\n{hint}"
        if self.current.is_program:
            _refused_programs[self.current] = error, exitcode
        raise WorkerCrashed(error, exitcode=exitcode)

    def require_untried(self) -> None:
        """Refuse to run a frozen program once more as a whole, after it has not become a worker.

        Raises:
            WorkerCrashed: The error that it ended in then.
        """
        if self.current in _refused_programs:
            error, exitcode = _refused_programs[self.current]
            raise WorkerCrashed(error, exitcode=exitcode)


# Of this process; a forked child inherits what is known.
_proved: set[Interpreter] = set()
_refused_programs: dict[Interpreter, tuple[str, int | None]] = {}


def find_interpreter() -> str:
    """Return the path of this process's interpreter, for modules of mpreader that run in a process of their own.

    Raises:
        PoolError: There is none: the program is frozen.
    """
    found = InterpreterChoice().current
    if found.is_program:
        raise PoolError("this needs a Python interpreter, and a frozen program (PyInstaller, cx_Freeze, …) has none")
    return found.path


def require_no_worker() -> None:
    """Refuse to start workers in a process that was itself started to be a worker.

    Raises:
        PoolError: This is such a process.
    """
    if MARK in os.environ:
        raise PoolError(
            f"this program was started by process {os.environ[MARK]} to be a worker of mpreader, but runs as a whole. "
            + _FROZEN_HINT
        )


def _candidates() -> Iterator[Interpreter]:
    """Executables to try, the most trustworthy first; of those with another name than an interpreter's one only."""
    chosen, usual = _text(spawn.get_executable()), _text(sys.executable)
    if _is_frozen():
        yield Interpreter(usual if _is_executable(usual) else "/proc/self/exe", is_program=True)
        return
    if _is_compiled() and not _has_code():
        yield Interpreter("/proc/self/exe", is_program=True)
        return
    if chosen and chosen != usual:
        yield Interpreter(chosen, is_certain=_runs_this_process(chosen))
        return
    paths = list(dict.fromkeys(path for path in (usual, *_installed()) if _is_executable(path)))
    named = [path for path in paths if _NAME.fullmatch(os.path.basename(path))]
    yield from (Interpreter(path, is_certain=True) for path in named if _runs_this_process(path))
    yield from (Interpreter(path) for path in named if not _runs_this_process(path))
    if _is_compiled():
        yield Interpreter("/proc/self/exe", is_program=True)
    else:
        # Whatever it is, it is started once at most.
        yield from (Interpreter(path) for path in paths[:1] if path not in named)


def _installed() -> Iterator[str]:
    """Paths at which this process's interpreter may be; not all of them exist."""
    yield _text(getattr(sys, "_base_executable", ""))
    with contextlib.suppress(OSError):  # no /proc
        yield os.readlink("/proc/self/exe")
    for folder in (
        os.path.join(sys.prefix, "bin"),
        os.path.join(sys.base_exec_prefix, "bin"),
        _text(sysconfig.get_config_var("BINDIR")),
    ):
        for name in (_usual_name(), "python3", "python"):
            yield os.path.join(folder, name)


def _usual_name() -> str:
    major, minor = sys.version_info[:2]
    return f"pypy{major}.{minor}" if sys.implementation.name == "pypy" else f"python{major}.{minor}"


def _is_frozen() -> bool:
    return bool(getattr(sys, "frozen", False))


def _is_compiled() -> bool:
    """True in a program compiled by Nuitka, where ``sys.executable`` may be an interpreter, or no file at all."""
    return hasattr(sys.modules.get("__main__"), "__compiled__") or "__compiled__" in globals()


def _has_code() -> bool:
    """True if an interpreter that is given :data:`ROOT` finds a worker's code: in a folder, or in an archive."""
    return os.path.isfile(ROOT) or os.path.isdir(os.path.join(ROOT, "mpreader", "pool", "worker"))


def _runs_this_process(path: str) -> bool:
    try:
        is_same = os.path.samefile(path, "/proc/self/exe")
        real = os.path.realpath(path)
    except OSError:  # no /proc, or no such file, or a filter refuses to tell
        return False
    return is_same and _NAME.fullmatch(os.path.basename(real)) is not None


def _is_executable(path: str) -> bool:
    return os.path.isabs(path) and os.path.isfile(path) and os.access(path, os.X_OK)


def _text(path: str | bytes | None) -> str:
    return os.fsdecode(path) if path else ""
