"""Faults of a server, and the schedules by which :class:`mpreader.testing.FaultServer` injects them.

This module decides which fault strikes which request. It sends nothing: :mod:`mpreader.testing.response` makes the
wrong responses, and the server breaks the connections.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

__all__ = ["TRANSIENT_KINDS", "Fault", "FaultKind", "Schedule", "random_faults", "scattered_faults"]


class FaultKind(Enum):
    """Ways in which a response, or a connection, can be bad; each value tells what happens."""

    RESET = "the connection is reset after after_bytes of the body"
    EARLY_CLOSE = "the connection is closed in order (FIN) after after_bytes of the body"
    CLOSE_ON_ACCEPT = "the connection is closed as soon as it is there; counts connections, not requests"
    STALL = "after after_bytes of the body nothing comes for seconds"
    TRICKLE = "after after_bytes of the body one byte comes every seconds"
    SLOW = "after after_bytes of the body 4 KiB come every seconds"
    DELAY = "the response starts only after seconds"
    WRONG_LENGTH = "Content-Length is wrong by delta; then the connection is closed"
    WRONG_RANGE = "Content-Range names a range delta bytes further on; the body is that of the right one"
    WRONG_TOTAL = "Content-Range names a total size wrong by delta"
    WHOLE_OBJECT = "status 200 and the whole object instead of the range"
    EXTRA_BYTES = "delta more bytes follow the body"
    STATUS = "an S3 error: status, with S3's XML body"
    NO_ETAG = "the response has no ETag"
    OTHER_ETAG = "the response has the ETag of another version, and If-Match is ignored"
    WEAK_ETAG = "the response has the right ETag as a weak one, which no If-Match fits (412)"
    OTHER_MODIFIED = "the response has the Last-Modified of another version, and no ETag; If-Match is ignored"
    NO_VALIDATORS = "the response has nothing that tells versions apart: no ETag, no Last-Modified"
    NO_IF_MATCH = "a request with If-Match is refused with status, whatever it says; others are answered well"
    COMPRESSED = "the body is compressed on the way (gzip, in chunks), though Accept-Encoding does not allow it"
    OVERWRITTEN = "the object is replaced by the one that was staged, just before the response"
    FLIPPED_BIT = "one bit of the body is wrong: of the byte covering, else of byte after_bytes of the body"


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault and the requests that it strikes. Picklable.

    A fault counts, from 1, the requests that match its ``method``, ``path`` and ``covering``, and strikes those
    whose number is in ``at``. If several faults would strike one request, only the first one of the schedule does.

    Args:
        kind: Kind of the fault.
        at: Numbers of the matching requests that are struck: ``(3, 5)``, ``range(1, 30)``; None: all.
        method: Method of the matching requests.
        path: Path of the matching requests, as in the server's objects; None: any.
        covering: Match only requests whose range holds this byte of the object; None: any range.
        until_s: Seconds after the schedule was set from which on it strikes no more; None: it never ends.
        after_bytes: Bytes of the body that are sent unchanged before the fault.
        after_share: Share of the body, 0 to 1, that is sent unchanged before the fault; None: ``after_bytes`` says it.
        seconds: Duration of STALL and DELAY; time between two bytes of TRICKLE, between 4 KiB of SLOW.
        delta: Bytes by which WRONG_LENGTH, WRONG_RANGE, WRONG_TOTAL and EXTRA_BYTES are wrong.
        status: HTTP status of STATUS and NO_IF_MATCH.
        code: S3's error code of STATUS, such as ``"ExpiredToken"``; "": the usual one of the status.

    Raises:
        ValueError: A number makes no sense for the kind.
    """

    kind: FaultKind
    at: Container[int] | None = None
    method: str = "GET"
    path: str | None = None
    covering: int | None = None
    until_s: float | None = None
    after_bytes: int = 0
    after_share: float | None = None
    seconds: float = 0.1
    delta: int = 1
    status: int = 503
    code: str = ""

    def __post_init__(self) -> None:
        if self.after_bytes < 0 or self.seconds < 0:
            raise ValueError("after_bytes and seconds must not be negative")
        if self.after_share is not None and not 0 <= self.after_share <= 1:
            raise ValueError(f"after_share must not be less than 0 or more than 1, got {self.after_share}")
        if self.kind is FaultKind.EXTRA_BYTES and self.delta < 1:
            raise ValueError("EXTRA_BYTES needs a delta of at least 1")
        if self.kind is FaultKind.STATUS and not 300 <= self.status <= 599:
            raise ValueError(f"STATUS needs an error's status, got {self.status}")

    def unchanged_bytes(self, nbytes: int) -> int:
        """Bytes of a body of ``nbytes`` bytes that are sent unchanged before the fault."""
        return min(self.after_bytes, nbytes) if self.after_share is None else int(self.after_share * nbytes)


TRANSIENT_KINDS: Final = (
    FaultKind.RESET,
    FaultKind.EARLY_CLOSE,
    FaultKind.CLOSE_ON_ACCEPT,
    FaultKind.STALL,
    FaultKind.DELAY,
    FaultKind.WRONG_LENGTH,
    FaultKind.WRONG_RANGE,
    FaultKind.WRONG_TOTAL,
    FaultKind.WHOLE_OBJECT,
    FaultKind.EXTRA_BYTES,
    FaultKind.STATUS,
)
"""Kinds that a correct client survives by asking again, if they strike single requests."""


def random_faults(
    seed: int, *, gets: int = 100, rate: float = 0.1, kinds: Sequence[FaultKind] = TRANSIENT_KINDS
) -> tuple[Fault, ...]:
    """Make a schedule that strikes about ``rate`` of the first ``gets`` GETs; the same for the same arguments.

    Args:
        seed: Decides which GETs are struck, by what and where.
        gets: GETs after which nothing is struck any more.
        rate: Probability that a GET is struck, 0 to 1.
        kinds: Kinds to choose from.
    """
    rng = random.Random(seed)  # noqa: S311  # a schedule that can be repeated, not a secret
    return tuple(
        Fault(
            rng.choice(kinds),
            at=(number,),
            # Often before or right after the first byte, else early or late in a part.
            after_bytes=rng.choice((0, 1, rng.randrange(1 << 12), rng.randrange(1 << 20))),
            seconds=rng.uniform(0.01, 0.2),
            status=rng.choice((500, 503)),
        )
        for number in range(1, gets + 1)
        if rng.random() < rate
    )


def scattered_faults(fault: Fault, *, seed: int, every: int = 100, requests: int = 10_000) -> tuple[Fault, ...]:
    """Make a schedule that strikes one request of each ``every``; the same for the same arguments.

    Each strikes within the body after another share of it.

    Args:
        fault: What strikes; its ``at`` and ``after_share`` are chosen here.
        seed: Decides which requests are struck, and where.
        every: Requests of which exactly one is struck, from 1.
        requests: Requests after which nothing is struck any more.
    """
    rng = random.Random(seed)  # noqa: S311  # a schedule that can be repeated, not a secret
    return tuple(
        replace(fault, at=(first + rng.randrange(every),), after_share=rng.random())
        for first in range(1, requests + 1, every)
    )


class Schedule:
    """The faults of a server, with a count of the events that each has matched. Thread-safe."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._faults = tuple(faults)
        self._matches = [0] * len(self._faults)  # events that each fault has matched so far, by its index
        self._started = time.monotonic()
        self._lock = threading.Lock()  # guards the counts: each connection of the server has a thread

    def strike(self, matches: Callable[[Fault], bool]) -> Fault | None:
        """Count an event for all faults that it matches; returns the first that strikes it, None if none does.

        Args:
            matches: Tells of a fault if the event is one that it counts.
        """
        with self._lock:
            # The list is made whole, past the fault that strikes, so that each fault counts all events that it matches.
            striking = [fault for index, fault in enumerate(self._faults) if matches(fault) and self._is_due(index)]
        return striking[0] if striking else None

    def _is_due(self, index: int) -> bool:
        """Count a match of a fault; True if the fault strikes this time."""
        fault = self._faults[index]
        self._matches[index] += 1
        over = fault.until_s is not None and time.monotonic() - self._started > fault.until_s
        return not over and (fault.at is None or self._matches[index] in fault.at)
