"""Destination: the memory of a part, into which the body of its response is received without the bytes of its skips.

Used by :mod:`~mpreader.pool.worker.connection`. Small ranges that are near each other are requested as one; the gaps
between them are often most of its bytes. They are taken off the socket here, and dropped: no memory is touched for
them, and where there is no TLS, the kernel does not even copy them.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from mpreader.pool.worker.http import Response
    from mpreader.pool.worker.messages import Fetch

__all__ = ["Destination"]

# What is dropped is written here, if at all: with TLS, or by a kernel that knows no better. All threads of a worker
# share it, since nobody reads it. Most of it is never touched, and so takes no memory.
_DROPPED: Final = memoryview(bytearray(1024 * 1024))


class Destination:
    """Memory of one part, filled from its start.

    Args:
        fetch: The part.
        into: Memory for what is kept of it.
    """

    def __init__(self, fetch: Fetch, into: memoryview) -> None:
        self._into = into  # what is not filled yet
        self._offset = fetch.start  # of the next byte, in the object
        self._skips = list(fetch.skips[::-1])  # those that lie ahead; the next one comes last

    def receive(self, response: Response, most: int) -> int:
        """Receive the next bytes of the body, as many as have come, but no more than ``most``, and keep or drop them.

        Returns:
            Number of bytes received; 0 at the end of the body.

        Raises:
            MalformedResponse: As for :meth:`Response.receive_into`.
            OSError: As for :meth:`Response.receive_into`.
        """
        if not self._skips:
            return self._keep(response, self._into[:most])
        start, end = self._skips[-1]
        if self._offset < start:
            return self._keep(response, self._into[: min(most, start - self._offset)])
        count = response.receive_into(_DROPPED[: min(most, end - self._offset)], socket.MSG_TRUNC)
        self._offset += count
        if self._offset == end:
            self._skips.pop()
        return count

    def _keep(self, response: Response, into: memoryview) -> int:
        count = response.receive_into(into)
        self._into = self._into[count:]
        self._offset += count
        return count
