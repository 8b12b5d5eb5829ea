"""What the coordinator and a worker say to each other, one pickled message per packet of their private socket.

Both ends are the same code of the same user, so pickle is safe here; nothing received from a network is unpickled.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from mpreader.pool.worker.route import Route

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Cancel",
    "Failed",
    "FailureKind",
    "Fetch",
    "Fetched",
    "MapSegment",
    "Ping",
    "Pong",
    "Ready",
    "UnmapSegment",
]

MAX_MESSAGE_BYTES = 64 * 1024


class FailureKind(enum.IntEnum):
    """Why a GET brought no bytes, or not all; decides whether and when it is tried again."""

    UNREACHABLE = 1  # no connection: refused, unknown host, TLS
    BROKEN = 2  # the connection ended, or was reset, before the last byte
    STALLED = 3  # too few bytes in too long a time
    BUSY = 4  # the service asks to come back later (500, 503, 429, …)
    MALFORMED = 5  # an answer that is not what was asked for
    EXPIRED = 6  # the signature or the session token is too old
    DENIED = 7
    MISSING = 8
    CHANGED = 9  # another version of the object than the one pinned
    REFUSED = 10  # any other answer that a repetition won't change
    CANCELLED = 11


# -- to the worker


class MapSegment(NamedTuple):
    """Map the shared memory whose file descriptor comes with this message."""

    segment: int
    size: int


class UnmapSegment(NamedTuple):
    """Forget a segment; sent only when no part is being received into it."""

    segment: int


class Fetch(NamedTuple):
    """Receive bytes [start, end) of an object into a segment at ``segment_offset``."""

    part: int
    route: Route
    etag: str
    object_size: int
    start: int
    end: int
    segment: int
    segment_offset: int


class Cancel(NamedTuple):
    """Stop receiving a part; it is still answered with Failed or Fetched."""

    part: int


class Ping(NamedTuple):
    """Say that you are alive."""


# -- to the coordinator


class Ready(NamedTuple):
    """The worker has started."""


class Pong(NamedTuple):
    """The worker is alive."""


class Fetched(NamedTuple):
    """All bytes of a part are in its segment.

    It took ``seconds``; in ``stalled_s`` of them the receiving thread could have run, and waited for a processor.
    The request was begun at ``started_s``, and its answer at ``answered_s``, by the monotonic clock, on ``connection``,
    counted within the worker.
    """

    part: int
    seconds: float
    stalled_s: float
    connection: int = 0
    started_s: float = 0.0
    answered_s: float = 0.0


class Failed(NamedTuple):
    """A part is not, or not wholly, in its segment; its first ``received`` bytes are.

    ``detail`` is for people and holds no secret. ``retry_after_s`` is the server's wish, 0 where it has none. The rest
    is as for :class:`Fetched`; ``answered_s`` is 0 where there was no answer.
    """

    part: int
    kind: FailureKind
    received: int
    detail: str
    retry_after_s: float = 0.0
    seconds: float = 0.0
    connection: int = 0
    started_s: float = 0.0
    answered_s: float = 0.0
