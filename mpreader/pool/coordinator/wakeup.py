"""Wake-up: lets other threads end the coordinator's wait.

It is a pipe rather than a condition, so that the coordinator waits for it and for its workers in one ``select``; and
rather than an eventfd, which some sandboxes refuse.
"""

from __future__ import annotations

import contextlib
import os
import posix
import threading

from mpreader.shared_memory import naming

__all__ = ["Wakeup"]

_MOST_BYTES = 65536  # a pipe's; more are not in it


class Wakeup:
    """An event that any thread may set, also a garbage collector in the middle of anything.

    Attributes:
        fd: Readable while the event is set.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(self) -> None:
        with naming("pipe2"):
            self.fd, self._writable_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # It keeps `set` from writing to a descriptor that `close` has just given away. Reentrant, since a garbage
        # collection inside `set` may close a transfer that was dropped, which calls `set`.
        self._lock = threading.RLock()

    def set(self) -> None:
        """Set the event; does nothing after ``close``."""
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(BlockingIOError):  # it is full, so it is set
                    os.write(self._writable_fd, b"\0")

    def clear(self) -> None:
        """Reset the event; harmless if it is not set."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, _MOST_BYTES)

    def close(self) -> None:
        """Give back the descriptors. Idempotent."""
        with self._lock:
            if self.fd >= 0:
                posix.close(self.fd)
                posix.close(self._writable_fd)
                self.fd = -1

    def abandon(self) -> None:
        """Close it in a forked child, where a thread that is not here may have held the lock."""
        self._lock = threading.RLock()
        self.close()
