"""Trust in the certificate authority of the test servers, for one process.

s3torchconnector trusts the authorities of the system only, and has no setting for others. So the measured process finds
the test authority, too, in the system's file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from private import NotReplaced, replace_for_this_process

__all__ = ["trust_in_this_process"]

_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")


def trust_in_this_process(ca_file: Path) -> None:
    """Add ``ca_file`` to the system's file of authorities, for this process and its children.

    Raises:
        NotReplaced: It could not be added.
    """
    if not _BUNDLE.exists():
        raise NotReplaced(f"there is no {_BUNDLE} to add the test authority to")
    replace_for_this_process(_BUNDLE, _BUNDLE.read_bytes() + ca_file.read_bytes())
