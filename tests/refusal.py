"""Refusal of system calls: runs a program whose kernel refuses some, as containers' filters, gVisor and old kernels do.

A small program of its own installs a seccomp filter and then becomes the program under test, which the filter outlives,
as it does all that the program starts. Or the program installs it itself, later, where its imports need the call, too.
"""

from __future__ import annotations

import errno
import functools
import platform
import subprocess
import sys
from collections.abc import Sequence

import pytest

__all__ = ["refusing", "statement_refusing"]

# Numbers on x86-64 and on 64-bit ARM.
_NUMBERS = {
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "epoll_wait": (232, 22),
    "eventfd2": (290, 19),
    "fallocate": (285, 47),
    "fstatfs": (138, 44),
    "ftruncate": (77, 46),
    "ioctl": (16, 29),
    "memfd_create": (319, 279),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pipe2": (293, 59),
    "prctl": (157, 167),
    "recvfrom": (45, 207),
    "sched_getaffinity": (204, 123),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "setsid": (112, 157),
    "socketpair": (53, 199),
    "statfs": (137, 43),
}
_MACHINES = {"x86_64": (0, 317), "aarch64": (1, 277)}  # column of the table above, and the number of seccomp itself

_PROGRAM = """
import ctypes, os, struct, sys
error, seccomp, numbers, *command = {arguments}
program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the number of the call
for number in numbers:
    program.append(struct.pack("HBBI", 0x15, 0, 1, number))  # if it is this one,
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error))  # refuse
program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
code = ctypes.create_string_buffer(b"".join(program))

class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

libc, what = ctypes.CDLL(None, use_errno=True), Filter(len(program), ctypes.cast(code, ctypes.c_void_p))
if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.syscall(seccomp, 1, 1, ctypes.byref(what)) != 0:
    raise OSError(ctypes.get_errno(), "can't install a filter")
if command:
    os.execvp(command[0], command)
"""


def refusing(calls: Sequence[str], error: int = errno.ENOSYS) -> list[str]:
    """Return the start of a command that runs the rest of it without some system calls; skips the test where it can't.

    Args:
        calls: Names of the system calls.
        error: Error that they end in.
    """
    if not _can_filter():
        pytest.skip("system calls can't be filtered here (seccomp)")
    return _command(calls, error)


def statement_refusing(calls: Sequence[str], error: int = errno.ENOSYS) -> str:
    """Return lines of a program from which on it, and all that it starts, is refused some system calls.

    Args:
        calls: Names of the system calls.
        error: Error that they end in.
    """
    if not _can_filter():
        pytest.skip("system calls can't be filtered here (seccomp)")
    return _PROGRAM.format(arguments=_arguments(calls, error))


def _command(calls: Sequence[str], error: int) -> list[str]:
    return [sys.executable, "-S", "-c", _PROGRAM.format(arguments=f"{_arguments(calls, error)}, *sys.argv[1:]")]


def _arguments(calls: Sequence[str], error: int) -> str:
    column, seccomp = _MACHINES[platform.machine()]
    return f"{error}, {seccomp}, {[_NUMBERS[call][column] for call in calls]}"


@functools.cache
def _can_filter() -> bool:
    if platform.machine() not in _MACHINES:
        return False
    command = [*_command(["memfd_create"], errno.ENOSYS), "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
