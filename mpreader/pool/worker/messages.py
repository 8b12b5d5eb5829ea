"""Messages between the coordinator and a worker: named tuples, each pickled into one packet of their private socket.

Used by the coordinator and by :mod:`~mpreader.pool.worker.main`. Both ends are the same code, run by the same user, so
unpickling a message is safe; nothing that comes from a network is ever unpickled. The module must not import anything
that is slow to import, since it is part of a worker's start.

A *part* is one ranged GET. The coordinator gives each part a number of its own, which is never used again.
"""

from __future__ import annotations

import enum
import sys
from typing import NamedTuple

from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import ObjectVersion, Validators

__all__ = [
    "MAX_MESSAGE_BYTES",
    "AskProgress",
    "Cancel",
    "Failed",
    "FailureKind",
    "Fetch",
    "Fetched",
    "MapSegment",
    "PartProgress",
    "Ping",
    "Pong",
    "Progress",
    "Ready",
    "Shorten",
    "UnmapSegment",
    "python_name",
]

# Buffer size of each receive, larger than any Fetch with a presigned URL. The rest of a longer packet would be dropped
# by the kernel without an error.
MAX_MESSAGE_BYTES = 64 * 1024


class FailureKind(enum.IntEnum):
    """Reason why a GET brought no bytes, or not all of them.

    The coordinator decides by it whether and when the part is requested again.
    """

    UNREACHABLE = 1  # no connection: refused, unknown host, TLS
    BROKEN = 2  # the connection ended, or was reset, before the last byte
    STALLED = 3  # too few bytes arrived within the stall timeout
    BUSY = 4  # the service is overloaded, or failed for the moment (500, 503, 429, …)
    MALFORMED = 5  # a response that does not fit the request
    EXPIRED = 6  # the signature or the session token is too old
    DENIED = 7  # the credentials are wrong, or may not read the object
    MISSING = 8  # there is no such object
    CHANGED = 9  # another version of the object than the expected one
    REFUSED = 10  # any other response, which will be the same the next time; also a bug in the worker
    CANCELLED = 11  # by a Cancel message: nobody wants the part any more
    REDIRECTED = 12  # the server names another address, which a worker can't follow
    SLOW = 13  # by a Cancel message: the part is much slower than its peers, and its rest is requested again


# -- to the worker


class MapSegment(NamedTuple):
    """Request to map the shared memory whose file descriptor comes with this message.

    Attributes:
        segment: Number by which later messages name it.
        size: Length in bytes.
    """

    segment: int
    size: int


class UnmapSegment(NamedTuple):
    """Request to unmap a segment; sent only when no part is being received into it."""

    segment: int


class Fetch(NamedTuple):
    """Request to receive bytes [start, end) of an object into a segment.

    Attributes:
        part: Number of the part.
        route: Server, proxy and presigned target by which the object is requested.
        version: Version that the response must be of; without validators: any of this size.
        start: First byte of the object.
        end: One past the last byte of the object.
        segment: Number of a mapped segment.
        segment_offset: Byte of the segment to which ``start`` goes.
        skips: Stretches ``(start, end)`` of the object, sorted and disjoint, that are received and not kept: what
            follows one is put behind what comes before it.
    """

    part: int
    route: Route
    version: ObjectVersion
    start: int
    end: int
    segment: int
    segment_offset: int
    skips: tuple[tuple[int, int], ...] = ()

    @property
    def kept_bytes(self) -> int:
        """Number of bytes that go to the segment."""
        return self.end - self.start - sum(end - start for start, end in self.skips)


class Cancel(NamedTuple):
    """Request to stop receiving a part. The worker still sends one Failed or Fetched for the part's Fetch.

    Attributes:
        part: Number of the part.
        kind: Kind with which the part fails: CANCELLED or SLOW.
    """

    part: int
    kind: FailureKind = FailureKind.CANCELLED


class Shorten(NamedTuple):
    """Request to receive less of a part: another request takes the rest.

    The worker may be past that place already, or have ended; its Fetched or Failed says how far it came.

    Attributes:
        part: Number of the part.
        nbytes: Bytes, from the start of its Fetch, after which it is to end.
    """

    part: int
    nbytes: int


class AskProgress(NamedTuple):
    """Request for a Progress."""


class Ping(NamedTuple):
    """Request for a Pong. A worker that sends nothing for ``PoolConfig.worker_timeout_s`` is killed and replaced."""


# -- to the coordinator


def python_name() -> str:
    """Return kind and version of the running interpreter, such as ``"cpython 3.11"``."""
    return f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"


class Ready(NamedTuple):
    """The worker has started. Proves to the coordinator that what it has started is a worker.

    Attributes:
        pid: Process id of the worker.
        python: Kind and version of its interpreter; see :func:`python_name`.
    """

    pid: int = 0
    python: str = ""


class Pong(NamedTuple):
    """The worker is alive."""


class PartProgress(NamedTuple):
    """A part that a connection is receiving now.

    Attributes:
        part: Number of the part.
        received: Bytes of it that are in its segment.
        started_s: Time at which the worker began with it, by the monotonic clock.
        first_byte_s: Time at which the response began; 0 if it has not.
    """

    part: int
    received: int
    started_s: float
    first_byte_s: float


class Progress(NamedTuple):
    """The parts that the worker is receiving at this moment; parts that wait for a connection are left out."""

    parts: tuple[PartProgress, ...]


class Fetched(NamedTuple):
    """All bytes of a part are in its segment, or as many as a Shorten has left of it.

    Points of time are of the monotonic clock, which all processes of a host share.

    Attributes:
        part: Number of the part.
        seconds: Time from ``started_s`` until the last byte was received.
        processor_wait_s: Time, out of ``seconds``, in which the receiving thread was ready to run, but waited for a
            processor. The coordinator opens no further connections where it is long.
        connection: Number of the connection within the worker.
        started_s: Time at which the worker began with the part.
        first_byte_s: Time at which the response began.
        found: Validators of the response that the expected version does not have.
        received: Bytes received; None: all that the Fetch asked for.
    """

    part: int
    seconds: float
    processor_wait_s: float
    connection: int = 0
    started_s: float = 0.0
    first_byte_s: float = 0.0
    found: Validators = ()
    received: int | None = None


class Failed(NamedTuple):
    """A part is not, or not wholly, in its segment.

    Attributes:
        part: Number of the part.
        kind: Reason, by which the coordinator decides what to do.
        received: Number of bytes, from the start of the part, that are in the segment and are right.
        detail: Reason for people; holds no secret.
        retry_after_s: Seconds that the server asks to wait, 0 where it does not.
        seconds: Time from ``started_s`` until the failure.
        connection: Number of the connection within the worker.
        started_s: Time at which the worker began with the part.
        first_byte_s: Time at which the response began; 0 if there was none.
        found: Validators of the response, if it was accepted, that the expected version does not have.
        code: S3's error code, where the server has refused the request with one.
    """

    part: int
    kind: FailureKind
    received: int
    detail: str
    retry_after_s: float = 0.0
    seconds: float = 0.0
    connection: int = 0
    started_s: float = 0.0
    first_byte_s: float = 0.0
    found: Validators = ()
    code: str = ""
