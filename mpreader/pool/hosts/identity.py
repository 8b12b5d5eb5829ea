"""Identity of a host: what each rank tells of itself, and who leads whom. Pure, but for the facts of this process.

A rank offers to lead by a socket in the abstract namespace: it is no file, needs no clean-up and belongs to a network
namespace. So ranks of one host are those that have the kernel, that namespace and the user in common. Containers that
share a kernel, but nothing else, have identities of their own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["TOKEN_BYTES", "HostOffer", "HostShare", "Listener", "group", "host_identity", "peer_user"]

TOKEN_BYTES: Final = 32
_MOST_WAITING: Final = 4096  # ranks of a host that have connected, and were not accepted yet

_PEER: Final = struct.Struct("3i")  # SO_PEERCRED: process, user, group

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NETWORK: Final = Path("/proc/self/ns/net")


class HostOffer(NamedTuple):
    """Offer of a rank to lead its host: what it tells the others of itself.

    Attributes:
        identity: Identity of its host; see :func:`host_identity`.
        address: Name of its socket.
        token: What a member says first. It is known to the ranks of this load only.
    """

    identity: str
    address: bytes
    token: bytes

    def __repr__(self) -> str:
        return f"HostOffer({self.identity!r})"  # not the token: a plan may be logged


class HostShare(NamedTuple):
    """Share that a rank has in its host's load, as the rank that plans tells it.

    Attributes:
        leader: Offer of the rank that receives for all.
        place: Place of this rank among those of its host; the leader has 0.
        ranks: Number of ranks of the host, the leader included.
    """

    leader: HostOffer
    place: int
    ranks: int


class Listener:
    """Socket on which the other ranks of the host reach this one.

    Raises:
        OSError: There is no descriptor left, or a sandbox refuses it.
    """

    def __init__(self) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self.address = b"\0mpreader-" + secrets.token_hex(16).encode()
        self._pid = os.getpid()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self.socket.bind(self.address)
            self.socket.listen(_MOST_WAITING)
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Refuse whoever connects from now on. Idempotent."""
        if os.getpid() == self._pid:  # a forked child has a copy of the descriptor, and lets go of that only
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def host_identity() -> str:
    """Return a text that two processes have in common if each can reach the other by a socket without a file.

    Raises:
        OSError: The system doesn't tell.
    """
    network = os.stat(_NETWORK)
    return f"{_BOOT_ID.read_text().strip()}:{network.st_dev}:{network.st_ino}:{os.getuid()}"


def peer_user(connection: socket.socket) -> int:
    """Return the number of the user at the other end of a connection; -1 where a sandbox does not tell."""
    try:
        return int(_PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1])
    except OSError:
        return -1


def group(offers: Sequence[HostOffer | None]) -> list[HostShare | None]:
    """Find out which ranks share a host.

    Args:
        offers: What each rank told; None for those that do not share.

    Returns:
        For each rank what it is told; None if there is nobody that it could share with.
    """
    hosts: dict[str, list[int]] = {}
    for rank, offer in enumerate(offers):
        if offer is not None:
            hosts.setdefault(offer.identity, []).append(rank)
    shares: list[HostShare | None] = [None] * len(offers)
    for ranks in hosts.values():
        leader = offers[ranks[0]]
        if len(ranks) > 1 and leader is not None:
            for place, rank in enumerate(ranks):
                shares[rank] = HostShare(leader, place, len(ranks))
    return shares
