"""Request reports: tells the log, at DEBUG, and the observers of each GET that has ended.

Used by the coordinator, in its thread. Nothing that an observer does or raises stops a load.
"""

from __future__ import annotations

import logging

from mpreader.pool.coordinator.state import PartState
from mpreader.pool.worker.messages import Failed, Fetched
from mpreader.telemetry import events
from mpreader.telemetry.events import RequestEvent

__all__ = ["report_request"]

log = logging.getLogger(__name__)


def report_request(part: PartState, worker: int, nbytes: int, result: Fetched | Failed) -> None:
    """Report a GET, if anybody wants to know; otherwise this costs two look-ups.

    Args:
        part: The part, as it was before the result was noted.
        worker: Place of the worker in the pool.
        nbytes: Bytes that the GET brought.
        result: The worker's message about it.
    """
    if not events.observers and not log.isEnabledFor(logging.DEBUG):
        return
    ended_s = result.started_s + result.seconds
    event = RequestEvent(
        uri=part.slot_read.source.name.uri,
        worker=worker,
        connection=result.connection,
        start=part.range.start + part.received,
        end=part.range.end,
        received=nbytes,
        started_s=result.started_s,
        first_byte_s=result.first_byte_s or ended_s,
        ended_s=ended_s,
        outcome=result.kind.name.lower() if isinstance(result, Failed) else "ok",
        attempt=part.requests - part.cuts,
    )
    for observe in events.observers:
        try:
            observe(event)
        except Exception:  # noqa: PERF203  # each on its own: one that fails must not hide the event from the others
            log.exception("an observer of requests failed")
    log.debug(
        "request %s: %s bytes=%d-%d received=%d worker=%d connection=%d attempt=%d first_byte_ms=%.1f ms=%.1f",
        event.outcome,
        event.uri,
        event.start,
        event.end,
        event.received,
        event.worker,
        event.connection,
        event.attempt,
        1e3 * (event.first_byte_s - event.started_s),
        1e3 * (event.ended_s - event.started_s),
        extra={"mpreader": event._asdict()},
    )
