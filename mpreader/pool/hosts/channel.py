"""Channel: messages and descriptors over a connected socket between two processes of a host.

A message is pickled behind its length. A descriptor may come with it, of shared memory. Both ends are processes of one
user, and the member has said the token of the load, before anything is unpickled.
"""

from __future__ import annotations

import array
import contextlib
import pickle
import posix
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Final

__all__ = ["Channel", "ChannelClosed", "close_descriptors"]

_LENGTH: Final = struct.Struct("<IB")  # bytes of the message, and number of its descriptors
_RECEIVED_AT_ONCE: Final = 256 * 1024
# The plan of a rank is the largest message: 100 bytes an item. A longer one is none of ours.
_MOST_BYTES: Final = 1 << 30
_FDS_NBYTES: Final = socket.CMSG_SPACE(64 * 4)  # for the descriptors that one call may bring


class ChannelClosed(Exception):
    """The other process has closed its end, or is dead."""


class Channel:
    """One end of a connection. Never blocks. ``send`` may be called by several threads, all else by one.

    Args:
        connection: Connected stream socket of the family ``AF_UNIX``, which the channel owns from here on.

    Attributes:
        heard_s: Time of the last message, by the monotonic clock.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._lock = threading.Lock()
        self._unsent: deque[tuple[memoryview, list[int]]] = deque()
        self._has_ended = False
        self._received = bytearray()
        self._fds: deque[int] = deque()
        self.heard_s = time.monotonic()

    @property
    def fd(self) -> int:
        """Descriptor of the socket; -1 after ``close``."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """True while the other end has not read all: then ``flush`` when the socket is writable."""
        return bool(self._unsent)

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Let a selector, which waits for the socket, also wait until it can take what is unsent, if anything is."""
        key = selector.get_key(self.fd)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.has_unsent else 0)
        if key.events != events:
            selector.modify(self.fd, events, key.data)

    def send(self, message: object, fd: int | None = None) -> bool:
        """Send a message, or keep it until the other end has read; False if that end is gone.

        Args:
            message: The message.
            fd: Descriptor to pass with it.
        """
        data = pickle.dumps(message, protocol=5)
        fds = [] if fd is None else [posix.dup(fd)]  # the sender may close its own before this is sent
        self._unsent.append((memoryview(_LENGTH.pack(len(data), len(fds)) + data), fds))
        return self.flush()

    def flush(self) -> bool:
        """Send what was kept, as far as the other end reads; False if that end is gone."""
        # Whoever has the lock sends what was added meanwhile, too, so nobody waits for it. It may be this thread: a
        # garbage collection in the middle of a message may close a transfer that was dropped, which sends another one.
        while self._unsent and self._lock.acquire(blocking=False):
            try:
                if not self._send_unsent():
                    break  # the socket is full
            finally:
                self._lock.release()
        return not self._has_ended

    def _send_unsent(self) -> bool:
        """Send what was kept; False if the other end has to read first. Called under the lock."""
        while self._unsent:
            data, fds = self._unsent[0]
            try:
                sent = socket.send_fds(self._socket, [data], fds) if fds else self._socket.send(data)
            except BlockingIOError:
                return False
            except OSError:
                self._end()
                return True
            for fd in fds:
                posix.close(fd)
            self._unsent.popleft()
            if sent < len(data):
                self._unsent.appendleft((data[sent:], []))
        return True

    def receive(self) -> list[tuple[object, int | None]]:
        """Receive what has come: messages, each with its descriptor, which the caller closes.

        Raises:
            ChannelClosed: Nothing more will come.
        """
        before = len(self._received)
        while True:
            try:
                # Not recv_fds: it does not pass the flag on, and programs that this process starts would inherit them.
                data, ancillary, flags, _ = self._socket.recvmsg(
                    _RECEIVED_AT_ONCE, _FDS_NBYTES, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionError:  # closed, though not all was heard that this end has said
                data, ancillary, flags = b"", [], 0
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not data:
                if len(self._received) > before:
                    break  # what was said last is heard first; the end is there once more at the next call
                if self._received:
                    raise ChannelClosed("in the middle of a message")
                raise ChannelClosed("the other end has closed the connection")
            fds = [fd for _, _, packed in ancillary for fd in _fds_of(packed)]
            self._fds.extend(fds)
            if flags & socket.MSG_CTRUNC:  # the next one would be taken for that of this message
                raise ChannelClosed("a descriptor was lost: this process may have no more open (ulimit -n)")
            self._received += data
            if len(data) < _RECEIVED_AT_ONCE and not fds:
                break
        return self._cut()

    def _cut(self) -> list[tuple[object, int | None]]:
        messages: list[tuple[object, int | None]] = []
        try:
            self._cut_into(messages)
        except ChannelClosed:
            close_descriptors(messages)  # nobody hears of them
            raise
        return messages

    def _cut_into(self, messages: list[tuple[object, int | None]]) -> None:
        start = 0
        while len(self._received) - start >= _LENGTH.size:
            nbytes, fds = _LENGTH.unpack_from(self._received, start)
            if nbytes > _MOST_BYTES:
                raise ChannelClosed(f"a message of {nbytes} bytes")
            end = start + _LENGTH.size + nbytes
            if end > len(self._received):
                break
            if fds and not self._fds:
                raise ChannelClosed("a message without its descriptor")
            message = _unpickled(memoryview(self._received)[start + _LENGTH.size : end])
            messages.append((message, self._fds.popleft() if fds else None))
            start = end
        del self._received[:start]
        if messages:
            self.heard_s = time.monotonic()

    def close(self) -> None:
        """Close this end. Idempotent."""
        with self._lock, contextlib.suppress(OSError):
            self._end()
            for fd in self._fds:
                posix.close(fd)
            self._fds.clear()
            self._socket.close()

    def _end(self) -> None:
        """Let both ends find the connection closed, and drop what was not sent. Called under the lock."""
        self._has_ended = True
        unsent, self._unsent = self._unsent, deque()
        for fd in [fd for _, fds in unsent for fd in fds]:
            posix.close(fd)
        # Not only closed: a forked child may have a copy of the descriptor, which would keep the connection open.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def close_descriptors(messages: Iterable[tuple[object, int | None]]) -> None:
    """Close the descriptors of messages that nobody takes."""
    for _, fd in messages:
        if fd is not None:
            posix.close(fd)


def _unpickled(data: memoryview) -> object:
    try:
        with data:
            return pickle.loads(data)  # noqa: S301  # the peer is of this user, and knows the token
    except Exception as error:  # of any type: the peer is broken, or another program
        raise ChannelClosed(f"a message that can't be read: {error}") from error


def _fds_of(packed: bytes) -> list[int]:
    fds = array.array("i")
    fds.frombytes(packed[: len(packed) // fds.itemsize * fds.itemsize])
    return fds.tolist()
