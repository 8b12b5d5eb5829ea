"""Part: what the leader's own rank and the other ranks of a host have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mpreader.pool.hosts.board import Board
from mpreader.pool.hosts.messages import Joined
from mpreader.pool.source import Source
from mpreader.pool.stats import PoolStats
from mpreader.pool.transfer import Transfer

__all__ = ["HostPart"]


class HostPart(Protocol):
    """A rank's part in the read that its host shares. All methods are called by the rank, in any of its threads.

    ``joined`` comes first, then ``begin``. After the transfer was closed, ``leave`` ends the part.
    """

    @property
    def board(self) -> Board:
        """The board of the read; there is none before ``joined``."""

    @property
    def stats(self) -> PoolStats:
        """Statistics of the host's read, as far as this rank knows."""

    def joined(self) -> Joined:
        """Wait until the shared read has begun; returns what this rank takes of it.

        Raises:
            MpreaderError: It could not begin.
        """

    def begin(self, sources: Sequence[Source]) -> Transfer:
        """Return the rank's own read; ``sources`` are its objects.

        Raises:
            HostLost: The rank can't follow the read.
        """

    def flush(self) -> None:
        """Tell the leader of the views that have ended."""

    def check_held(self) -> None:
        """Check that what was copied until now was right: nobody else was given the memory meanwhile.

        Raises:
            HostLost: Somebody may have been: this rank has been silent for too long.
        """

    def leave(self) -> None:
        """End the rank's part; the others are served on."""

    def abandon(self) -> None:
        """End the rank's part without any wait, in the middle of a garbage collection for one."""

    def close(self) -> None:
        """End the rank's part, and in the leader the whole read: the others read on by themselves. Idempotent."""
