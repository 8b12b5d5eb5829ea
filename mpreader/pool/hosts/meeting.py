"""Meeting: ranks of a host that have no process group find each other under a name that all of them know.

::

    each rank      tries to bind a socket of that name; the first to succeed leads the meeting
    the others     connect ── their offers ──────────────────────────► leader, until all have come or the time is up
                   ◄──────────────────── each rank's share of the host ── leader

The socket is in the abstract namespace, as those of :mod:`mpreader.pool.hosts.identity` are: it is not a file, and ends
with its process. Each end checks that the other one runs as the same user. The leader frees the name before it answers
anybody, so that the ranks may meet again for their next load.
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
"""Seconds that ranks wait for each other, since some may still be building their models."""

_HELLO_S: Final = 5.0  # a rank sends its offer at once: a process that does not is no rank
_ANSWER_S: Final = 10.0  # that the others wait for the leader's answer, after the time is up
_RETRY_S: Final = 0.02  # between two attempts, when a leader has just ended or closed its meeting
_LENGTH: Final = struct.Struct("<I")
_MAX_MESSAGE_BYTES: Final = 4096


def meet(name: str, ranks: int, offer: HostOffer | None, *, timeout_s: float = MEETING_S) -> HostShare | None:
    """Meet the other ranks of this host.

    Args:
        name: Name of the meeting, the same for all of them. No other processes of this user may use it meanwhile.
        ranks: Number of ranks that will come, this one included.
        offer: Offer of this rank to the others. None: it does not share, and they need not wait for it.
        timeout_s: Seconds to wait for the others. Those that have come by then share.

    Returns:
        The share of this rank in its host's load; None if there is nobody to share with.

    Raises:
        OSError: The system refuses the sockets.
    """
    address = b"\0mpreader-meeting-" + hashlib.sha256(f"{host_identity()}\0{name}".encode()).hexdigest()[:32].encode()
    until = time.monotonic() + timeout_s
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
            try:
                listener.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return _lead(listener, name, ranks, offer, until)
        try:
            return _join(address, offer, until)
        except (OSError, ValueError) as error:  # the leader has ended, or has just closed the meeting
            if time.monotonic() >= until:
                log.debug("the ranks of this host could not be met: %s", error)
                return None
        time.sleep(_RETRY_S)


def _lead(listener: socket.socket, name: str, ranks: int, offer: HostOffer | None, until: float) -> HostShare | None:
    listener.listen(ranks)
    with contextlib.ExitStack() as stack:
        members: list[tuple[socket.socket, HostOffer | None]] = []
        while 1 + len(members) < ranks and (left_s := until - time.monotonic()) > 0:
            listener.settimeout(left_s)
            with contextlib.suppress(OSError, ValueError):  # the time is up, or what has connected is no rank
                connection = stack.enter_context(listener.accept()[0])
                members.append((connection, _received_offer(connection)))
        listener.close()
        if 1 + len(members) < ranks:
            log.warning(
                "only %d of %d ranks have come to load %r together within the time; the others read by themselves",
                *(1 + len(members), ranks, name),
            )
        shares = group([offer, *(offered for _, offered in members)])
        for (connection, _), share in zip(members, shares[1:], strict=True):
            with contextlib.suppress(OSError):  # a rank that has ended meanwhile
                _send(connection, None if share is None else [*_described(share.leader), share.place, share.ranks])
        return shares[0]


def _received_offer(connection: socket.socket) -> HostOffer | None:
    _check_peer(connection)
    connection.settimeout(_HELLO_S)
    described = _receive(connection)
    return None if described is None else _offer(described)


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
    if nbytes > _MAX_MESSAGE_BYTES:
        raise ValueError("not a message of a meeting")
    try:
        message: list[object] | None = json.loads(_receive_bytes(connection, nbytes))
    except RecursionError:  # lists within lists
        raise ValueError("no message of a meeting") from None
    if message is not None and not isinstance(message, list):
        raise ValueError("not a message of a meeting")
    return message


def _receive_bytes(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = connection.recv(nbytes - len(data))
        if not more:
            raise ConnectionError("the other end has closed the connection")
        data += more
    return data
