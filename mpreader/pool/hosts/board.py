"""Board: shared memory in which the processes of a shared read leave notes for each other.

It outlives the connections between them: a rank can look there after each copy, at no cost, and also when the leader is
dead. All notes are single bytes, each of which one process writes, so no lock is needed::

    rank 0, rank 1, …          0 while the rank takes part; written by the leader
    rank 0, rank 1, …          changes with each part that the rank takes; written by the rank
    note 0, note 1, …          0 until something was noted; written by one rank, for the others
"""

from __future__ import annotations

import mmap
import posix

from mpreader.shared_memory import fill, open_shared_memory, reserve

__all__ = ["Board"]


class Board:
    """A mapping of the board; :meth:`create` makes a new one.

    Args:
        fd: Descriptor of its memory, which the board owns from here on.
        ranks: Number of ranks that take part.

    Attributes:
        fd: The descriptor, to be passed to another process; -1 after ``close``.

    Raises:
        OSError: There is no memory, or no descriptor, left.
    """

    def __init__(self, fd: int, ranks: int) -> None:
        self.fd = fd
        self._ranks = ranks
        try:
            self._map = mmap.mmap(fd, 0)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, ranks: int, notes: int) -> Board:
        """Make the board of a read.

        Args:
            ranks: Number of ranks that take part.
            notes: Number of notes that the ranks may leave, besides the leader's.
        """
        size = 2 * ranks + notes
        fd = open_shared_memory(size)
        try:
            if not reserve(fd, 0, size):
                fill(fd, size)
        except BaseException:
            posix.close(fd)
            raise
        return cls(fd, ranks)

    def end(self, place: int) -> None:
        """Note that a rank takes part no more: its memory may be given to others."""
        self._map[place] = 1

    def has_ended(self, place: int) -> bool:
        """Returns True if a rank takes part no more."""
        return bool(self._map[place])

    def note(self, number: int, value: int) -> None:
        """Leave note ``number``, whose value is from 1 to 255."""
        self._map[2 * self._ranks + number] = value

    def noted(self, number: int) -> int:
        """Return note ``number``; 0 until it is left."""
        return self._map[2 * self._ranks + number]

    def tick(self, place: int) -> None:
        """Note that a rank gets on."""
        at = self._ranks + place
        self._map[at] = (self._map[at] + 1) % 256

    def ticks(self) -> bytes:
        """Return what has changed if any rank has got on."""
        return self._map[self._ranks : 2 * self._ranks]

    def close(self) -> None:
        """Give back the descriptor; what is on the board can still be read. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            posix.close(fd)
