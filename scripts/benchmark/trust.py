"""Trust in the test authority, for one process: s3torchconnector has no setting for authorities but the system's."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["Untrusted", "trust_in_this_process"]

_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_MS_BIND: Final = 0x1000
_MS_PRIVATE: Final = 0x40000
_MS_REC: Final = 0x4000


class Untrusted(Exception):
    """This process may not have a mount namespace of its own, or the system has no bundle where it is expected."""


def trust_in_this_process(ca_file: Path) -> None:
    """Lay a bundle with ``ca_file`` over the system's, seen by this process and its children only.

    Raises:
        Untrusted: That isn't possible.
    """
    if not _BUNDLE.exists():
        raise Untrusted(f"there is no {_BUNDLE} to add the test authority to")
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.unshare(_CLONE_NEWNS | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)))
    _call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    with tempfile.NamedTemporaryFile() as bundle:  # the mount keeps it
        bundle.write(_BUNDLE.read_bytes() + ca_file.read_bytes())
        bundle.flush()
        _call(libc.mount(bundle.name.encode(), os.fsencode(_BUNDLE.resolve()), None, _MS_BIND, None))


def _call(status: int) -> None:
    if status != 0:
        reason = os.strerror(ctypes.get_errno())
        raise Untrusted(f"its client trusts the system's authorities only, and a private mount failed: {reason}")
