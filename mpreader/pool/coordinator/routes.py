"""Routes of sources: decides when a caller is asked for a new one, and takes over what it answers.

The workers' way to an object does not last: its signature expires, and a server may refuse it though it lets others
read. The scheduler calls these functions, in the coordinator's thread; they change the state of sources and parts, and
post messages. They must not send, delay or end a part.
"""

from __future__ import annotations

import time
from typing import Final

from mpreader.pool.coordinator.state import PartState, ReadState, SlotReadState, SourceState
from mpreader.pool.requests import ResolveSource, SourceResolved
from mpreader.pool.source import Refusal
from mpreader.pool.worker.messages import Failed

__all__ = ["note_answer", "renew", "renew_if_old", "request", "try_reroute"]

# A signature in headers is good for 15 minutes, one in a query as long as the session token that made it, which is 5
# minutes for directory buckets; making one is cheap.
_ROUTE_AGE_S: Final = 240.0


def request(read: ReadState, source: SourceState) -> None:
    """Ask the caller for a route, and for the version where that is not known yet."""
    read.post(ResolveSource(read.id, source.number, source.version is None))


def note_answer(source: SourceState, message: SourceResolved) -> None:
    """Note the version and the route of a source, or why there are none."""
    if message.error is not None and source.route is not None and not source.is_renewing:
        return  # renewed in good time only: the old route may still serve
    source.is_renewing = False
    source.version = message.version or source.version
    if message.route is not None:
        source.route = message.route
        source.route_number += 1
    source.route_made = time.monotonic()
    source.error = message.error


def renew(slot_read: SlotReadState) -> None:
    """Get a new route for its source; parts must wait for it, since the old one was refused."""
    source = slot_read.source
    if not source.is_renewing:
        source.is_renewing = True
        request(slot_read.read, source)


def renew_if_old(slot_read: SlotReadState, now: float) -> None:
    """Ask for a new route for its source before the old one expires; the old one serves meanwhile."""
    source = slot_read.source
    if now - source.route_made > _ROUTE_AGE_S:
        source.route_made = now
        request(slot_read.read, source)


def try_reroute(part: PartState, failure: Failed) -> bool:
    """Get a route of another kind for its source; False if the refusal stands.

    Parts in flight are refused together: the first one asks, the others wait, and all are sent by the new route.
    """
    source = part.slot_read.source
    is_answered = source.error is not None or source.is_renewing or part.route_number != source.route_number
    if not is_answered and failure.kind in source.refusals:
        return False
    part.refusal = failure
    if is_answered:
        return True
    source.refusals.add(failure.kind)
    source.is_renewing = True
    read = part.slot_read.read
    read.post(ResolveSource(read.id, source.number, False, Refusal(failure.kind, failure.detail, failure.code)))
    return True
