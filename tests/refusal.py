"""Refusal of system calls: runs a program whose kernel refuses some, as containers' filters, gVisor and old kernels do.

A small program of its own installs a seccomp filter and then becomes the program under test, which the filter outlives,
as it does all that the program starts.
"""

from __future__ import annotations

import errno
import functools
import platform
import subprocess
import sys
from collections.abc import Sequence

import pytest

__all__ = ["refusing"]

# Numbers on x86-64 and on 64-bit ARM.
_NUMBERS = {
    "epoll_create1": (291, 20),
    "eventfd2": (290, 19),
    "fallocate": (285, 47),
    "fstatfs": (138, 44),
    "memfd_create": (319, 279),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
    "sched_getaffinity": (204, 123),
    "setsid": (112, 157),
    "socketpair": (53, 199),
    "statfs": (137, 43),
}
_MACHINES = {"x86_64": (0, 317), "aarch64": (1, 277)}  # column of the table above, and the number of seccomp itself

_PROGRAM = """
import ctypes, os, struct, sys
error, seccomp, numbers, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
program = [struct.pack("HBBI", 0x20, 0, 0, 0)]  # load the number of the call
for number in map(int, numbers):
    program.append(struct.pack("HBBI", 0x15, 0, 1, number))  # if it is this one,
    program.append(struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | error))  # refuse
program.append(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000))  # allow
code = ctypes.create_string_buffer(b"".join(program))

class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

libc, what = ctypes.CDLL(None, use_errno=True), Filter(len(program), ctypes.cast(code, ctypes.c_void_p))
if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.syscall(seccomp, 1, 1, ctypes.byref(what)) != 0:
    raise OSError(ctypes.get_errno(), "can't install a filter")
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


def _command(calls: Sequence[str], error: int) -> list[str]:
    column, seccomp = _MACHINES[platform.machine()]
    numbers = ",".join(str(_NUMBERS[call][column]) for call in calls)
    return [sys.executable, "-S", "-c", _PROGRAM, str(error), str(seccomp), numbers]


@functools.cache
def _can_filter() -> bool:
    if platform.machine() not in _MACHINES:
        return False
    command = [*_command(["memfd_create"], errno.ENOSYS), "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
