"""Links: the leader's connections to the other ranks of its host.

A process that connects is heard only if it runs as this user and has said the token of the load. All others find the
connection closed, and are told nothing.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import posix
import selectors
import socket
from collections.abc import Callable

from mpreader.pool.blocking import make_selector
from mpreader.pool.hosts.channel import Channel, ChannelClosed
from mpreader.pool.hosts.identity import TOKEN_BYTES, Listener, peer_user

__all__ = ["Links"]

log = logging.getLogger(__name__)


class _Link:
    """A process on the other end of a socket.

    Attributes:
        channel: Its connection; None until it has said the token.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.token = b""
        self.channel: Channel | None = None

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        else:
            self.connection.close()


class Links:
    """Connections to other ranks, each by a number of its own. Used by one thread.

    Args:
        listener: Where the ranks connect; closed by ``stop_listening``.
        wakeup_fd: Descriptor that ends a wait when it is readable.
        on_message: Called with the number of a rank, and what it says. If it raises, the rank is ended.
        on_end: Called with the number of a rank whose connection has ended, or is to end; calls ``close_link``.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(
        self,
        listener: Listener,
        wakeup_fd: int,
        on_message: Callable[[int, object], object],
        on_end: Callable[[int], object],
    ) -> None:
        self._listener = listener
        self._on_message = on_message
        self._on_end = on_end
        self._links: dict[int, _Link] = {}
        self._last_number = 0
        self._is_listening = False
        self._wakeup_fd = wakeup_fd
        self._selector = make_selector(wakeup_fd)

    def listen(self) -> None:
        """Let ranks connect from now on."""
        self._selector.register(self._listener.socket, selectors.EVENT_READ)
        self._is_listening = True

    def stop_listening(self) -> None:
        """Refuse whoever connects from now on."""
        if self._is_listening and self._listener.socket.fileno() >= 0:
            self._selector.unregister(self._listener.socket)
        self._is_listening = False
        self._listener.close()

    def wait(self, timeout_s: float) -> bool:
        """Wait until a rank says something, and hear it; returns True if the descriptor of the wake-up is readable."""
        for link in self._links.values():
            if link.channel is not None:
                link.channel.watch(self._selector)
        is_woken = False
        for key, _ in self._selector.select(max(0.0, timeout_s)):
            if key.fd == self._wakeup_fd:
                is_woken = True
            elif key.data is None:
                self._accept()
            else:
                self._read(key.data)
        return is_woken

    def numbers(self) -> list[int]:
        """Return the numbers of the connections, from 1, in the order in which they came."""
        return [*self._links]

    def heard_s(self, number: int) -> float:
        """Return when a rank has last said something, by the monotonic clock."""
        channel = self._links[number].channel
        assert channel is not None, "it has said the token"
        return channel.heard_s

    def send(self, number: int, message: object, fd: int | None = None) -> None:
        """Send a message, with a descriptor; nothing if the connection has ended."""
        link = self._links.get(number)
        if link is not None and link.channel is not None:
            link.channel.send(message, fd)

    def close_link(self, number: int) -> None:
        """Close a connection. Idempotent."""
        link = self._links.pop(number, None)
        if link is not None:
            self._selector.unregister(link.connection)
            link.close()

    def close(self) -> None:
        """Close what is left."""
        self.stop_listening()
        for number in self.numbers():
            self.close_link(number)
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # it would be asked for again at once, without an end
                log.debug("no more ranks of this host are let in: %s", error)
                self.stop_listening()
            return
        if peer_user(connection) != os.getuid():
            connection.close()
            return
        self._last_number += 1
        self._links[self._last_number] = _Link(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._last_number)

    def _read(self, number: int) -> None:
        link = self._links.get(number)
        if link is None:
            return
        try:
            if link.channel is None and not self._is_known(link):
                return
            assert link.channel is not None, "it has said the token"
            for message, fd in link.channel.receive():
                if fd is not None:
                    posix.close(fd)  # members have none to send
                self._on_message(number, message)
            if link.channel.has_unsent:
                link.channel.flush()
        except ChannelClosed:
            self._on_end(number)
        except Exception:
            log.exception("a rank of this host says what makes no sense: it reads by itself")
            self._on_end(number)

    def _is_known(self, link: _Link) -> bool:
        """Receive the token; True when all of it has come.

        Raises:
            ChannelClosed: It is another one.
        """
        try:
            data = link.connection.recv(TOKEN_BYTES - len(link.token))
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        link.token += data
        if not data or (len(link.token) == TOKEN_BYTES and not hmac.compare_digest(link.token, self._listener.token)):
            raise ChannelClosed("it does not know the token")
        if len(link.token) < TOKEN_BYTES:
            return False
        link.channel = Channel(link.connection)
        return True
