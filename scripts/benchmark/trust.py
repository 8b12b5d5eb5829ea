"""Trust in the certificate authority of the test servers, for one process.

s3torchconnector trusts the authorities of the system only, and has no setting for others. The measured process gets a
mount namespace of its own, in which the system's file holds the test authority, too; the machine is not changed.
"""

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
    """The process may not have a mount namespace of its own, or the system's authorities are not where expected."""


def trust_in_this_process(ca_file: Path) -> None:
    """Replace the system's file of authorities by one that has ``ca_file``, too, for this process and its children.

    Raises:
        Untrusted: It could not be replaced.
    """
    if not _BUNDLE.exists():
        raise Untrusted(f"there is no {_BUNDLE} to add the test authority to")
    libc = ctypes.CDLL(None, use_errno=True)
    # Who is not root needs a user namespace, too, to be allowed to mount.
    _call(libc.unshare(_CLONE_NEWNS | (0 if os.geteuid() == 0 else _CLONE_NEWUSER)))
    # Private: else the mount below would be seen outside of the namespace.
    _call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    with tempfile.NamedTemporaryFile() as bundle:  # its name is removed; the mount keeps the file
        bundle.write(_BUNDLE.read_bytes() + ca_file.read_bytes())
        bundle.flush()
        _call(libc.mount(bundle.name.encode(), os.fsencode(_BUNDLE.resolve()), None, _MS_BIND, None))


def _call(status: int) -> None:
    if status != 0:
        reason = os.strerror(ctypes.get_errno())
        raise Untrusted(f"its client trusts the system's authorities only, and a private mount failed: {reason}")
