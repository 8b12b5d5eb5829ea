"""Private files: another content of a file of the system, for the calling process and its children only.

The process gets a mount namespace of its own; the machine is not changed. :mod:`trust` and :mod:`names` use it.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["NotReplaced", "replace_for_this_process"]

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_MS_BIND: Final = 0x1000
_MS_PRIVATE: Final = 0x40000
_MS_REC: Final = 0x4000


class NotReplaced(Exception):
    """The process may not have a mount namespace of its own, or the file is not there."""


def replace_for_this_process(file: Path, content: bytes) -> None:
    """Let the calling process, and those that it starts, find ``content`` in a file of the system.

    Raises:
        NotReplaced: That is not possible here.
    """
    if not file.exists():
        raise NotReplaced(f"there is no {file}")
    libc = ctypes.CDLL(None, use_errno=True)
    # Who is not root needs a user namespace, too, to be allowed to mount.
    _call(file, libc.unshare(_CLONE_NEWNS | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)))
    # Private: else the mount below would be seen outside of the namespace.
    _call(file, libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    with tempfile.NamedTemporaryFile() as replacement:  # its name is removed; the mount keeps the file
        replacement.write(content)
        replacement.flush()
        _call(file, libc.mount(replacement.name.encode(), os.fsencode(file.resolve()), None, _MS_BIND, None))


def _call(file: Path, status: int) -> None:
    if status != 0:
        raise NotReplaced(f"another {file} needs a private mount, which failed: {os.strerror(ctypes.get_errno())}")
