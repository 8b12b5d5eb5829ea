"""Names of servers that have several addresses, as S3's do, for one process: it finds them in its ``/etc/hosts``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from private import NotReplaced, replace_for_this_process

__all__ = ["resolve_in_this_process"]

_HOSTS: Final = Path("/etc/hosts")


def resolve_in_this_process(name: str, addresses: Sequence[str]) -> None:
    """Let a name resolve to addresses, for this process and its children.

    Raises:
        NotReplaced: It does not resolve to all of them.
    """
    lines = "".join(f"{address} {name}\n" for address in addresses)
    replace_for_this_process(_HOSTS, _HOSTS.read_bytes() + b"\n" + lines.encode())
    found = {info[4][0] for info in socket.getaddrinfo(name, None)}
    if found != set(addresses):  # by /etc/host.conf only one address of each name may count
        raise NotReplaced(f"{name} resolves to {', '.join(map(str, sorted(found)))} only")
