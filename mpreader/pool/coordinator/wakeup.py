"""Wake-up: lets other threads end the coordinator's wait.

It is an eventfd rather than a condition, so that the coordinator waits for it and for its workers in one ``select``.
"""

from __future__ import annotations

import contextlib
import os
import threading

__all__ = ["Wakeup"]


class Wakeup:
    """An event that any thread may set, also a garbage collector in the middle of anything.

    Attributes:
        fd: Readable while the event is set.

    Raises:
        OSError: There is no descriptor left.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # It keeps `set` from writing to a descriptor that `close` has just given away. Reentrant, since a garbage
        # collection inside `set` may close a transfer that was dropped, which calls `set`.
        self._lock = threading.RLock()

    def set(self) -> None:
        """Set the event; does nothing after ``close``."""
        with self._lock:
            if self.fd >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Reset the event; harmless if it is not set."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """Give back the descriptor. Idempotent."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
                self.fd = -1

    def abandon(self) -> None:
        """Close it in a forked child, where a thread that is not here may have held the lock."""
        self._lock = threading.RLock()
        self.close()
