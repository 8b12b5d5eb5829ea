"""Meeting: ranks of a host that have no process group find each other by a name that all of them know.

::

    each rank      binds a socket of that name: who succeeds first leads the meeting ──┐
    the others     connect, and send their offers ────────────────────────────────────►│ until all have come,
                   ◄──────────────────── each is told its share of the host ───────────┘ or the time is up

The socket lies in the abstract namespace, as those of :mod:`mpreader.pool.hosts.identity` do: it is no file, and ends
with its process. Each end checks that the other one runs as the same user. The name is free again before anybody is
told anything, so that the ranks may meet again for their next load.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import struct
import time
from typing import Final

from mpreader.pool.hosts.identity import HostOffer, HostShare, group, host_identity, peer_user

__all__ = ["MEETING_S", "meet"]

log = logging.getLogger(__name__)

MEETING_S: Final = 60.0
"""Seconds that ranks wait for each other: some may still be making their models."""

_HELLO_S: Final = 5.0  # a process that has connected says at once what it has to say
_ANSWER_S: Final = 10.0  # beyond the end of the meeting
_AGAIN_S: Final = 0.02  # between two attempts, where the one who leads has just ended
_LENGTH: Final = struct.Struct("<I")
_MOST_BYTES: Final = 4096


def meet(name: str, ranks: int, offer: HostOffer | None, *, timeout_s: float = MEETING_S) -> HostShare | None:
    """Meet the other ranks of this host.

    Args:
        name: What all of them call the meeting. Others of this user must not use it at the same time.
        ranks: Number of ranks that come, this one included.
        offer: What this rank tells the others; None: that it does not share, so that they need not wait for it.
        timeout_s: Seconds to wait for them; those that have come until then share.

    Returns:
        The share that this rank has in its host's load; None if there is nobody to share with.

    Raises:
        OSError: The system refuses the sockets.
    """
    address = b"\0mpreader-meeting-" + hashlib.sha256(f"{host_identity()}\0{name}".encode()).hexdigest()[:32].encode()
    until = time.monotonic() + timeout_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as own:
            try:
                own.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return _lead(own, name, ranks, offer, until)
        try:
            return _join(address, offer, until)
        except (OSError, ValueError) as error:  # the one who leads has ended, or has just closed the meeting
            if time.monotonic() >= until:
                log.debug("the ranks of this host could not be met: %s", error)
                return None
        time.sleep(_AGAIN_S)


def _lead(own: socket.socket, name: str, ranks: int, offer: HostOffer | None, until: float) -> HostShare | None:
    own.listen(ranks)
    offers: list[HostOffer | None] = [offer]
    with contextlib.ExitStack() as stack:
        connections: list[socket.socket] = []
        while len(offers) < ranks and (left_s := until - time.monotonic()) > 0:
            own.settimeout(left_s)
            with contextlib.suppress(OSError, ValueError):  # the time is up, or who has connected is none of the ranks
                connection = stack.enter_context(own.accept()[0])
                _check_peer(connection)
                connection.settimeout(_HELLO_S)
                described = _receive(connection)
                offers.append(None if described is None else _offer(described))
                connections.append(connection)
        own.close()
        if len(offers) < ranks:
            log.warning(
                "only %d of %d ranks have come to load %r together within the time; the others read by themselves",
                *(len(offers), ranks, name),
            )
        shares = group(offers)
        for connection, share in zip(connections, shares[1:], strict=True):
            with contextlib.suppress(OSError):  # a rank that has ended meanwhile
                _send(connection, None if share is None else [*_described(share.leader), share.place, share.ranks])
        return shares[0]


def _join(address: bytes, offer: HostOffer | None, until: float) -> HostShare | None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(max(0.0, until - time.monotonic()) + _ANSWER_S)
        connection.connect(address)
        _check_peer(connection)
        _send(connection, None if offer is None else _described(offer))
        share = _receive(connection)
        if share is None:
            return None
        *leader, place, ranks = share
        return HostShare(_offer(leader), int(str(place)), int(str(ranks)))


def _check_peer(connection: socket.socket) -> None:
    if peer_user(connection) != os.getuid():
        raise PermissionError(errno.EPERM, "another user has a socket of this name")


def _described(offer: HostOffer) -> list[str]:
    return [offer.identity, offer.address.hex(), offer.token.hex()]


def _offer(described: list[object]) -> HostOffer:
    identity, address, token = map(str, described)
    return HostOffer(identity, bytes.fromhex(address), bytes.fromhex(token))


def _send(connection: socket.socket, message: list[object] | list[str] | None) -> None:
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> list[object] | None:
    (nbytes,) = _LENGTH.unpack(_receive_bytes(connection, _LENGTH.size))
    if nbytes > _MOST_BYTES:
        raise ValueError("no message of a meeting")
    message: list[object] | None = json.loads(_receive_bytes(connection, nbytes))
    if message is not None and not isinstance(message, list):
        raise ValueError("no message of a meeting")
    return message


def _receive_bytes(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("the other end has closed the connection")
        data += more
    return data
