"""OpenTelemetry metrics of what the worker pools do.

=====================================  =========  ==============================================
``mpreader.received``                  counter    bytes received (By)
``mpreader.retries``                   counter    requests made again ({request})
``mpreader.request.duration``          histogram  from the request to its last byte (s)
``mpreader.request.time_to_first_byte``  histogram  from the request to its answer (s)
=====================================  =========  ==============================================

Attributes are those of OpenTelemetry's conventions: ``aws.s3.bucket``, or ``server.address`` where it is no S3;
``error.type`` where a request failed. Keys of objects are none: each would be a time series of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mpreader.errors import ConfigError
from mpreader.pool.observer import RequestEvent, add_observer, remove_observer

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

__all__ = ["instrument"]


def instrument(meter_provider: MeterProvider | None = None) -> Callable[[], None]:
    """Report every request of every worker pool of this process from now on.

    Args:
        meter_provider: Where to. None: OpenTelemetry's global one.

    Returns:
        What ends it; idempotent.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.metrics import get_meter
    except ImportError:
        raise ConfigError("metrics need OpenTelemetry: pip install 'mpreader[otel]'") from None
    from mpreader import __version__

    meter = get_meter("mpreader", __version__, meter_provider)
    received = meter.create_counter("mpreader.received", "By", "Bytes received")
    retries = meter.create_counter("mpreader.retries", "{request}", "Requests made again")
    duration = meter.create_histogram("mpreader.request.duration", "s", "From a request to its last byte")
    first_byte = meter.create_histogram("mpreader.request.time_to_first_byte", "s", "From a request to its answer")

    def report(event: RequestEvent) -> None:
        place = _place(event.uri)
        outcome = place if event.outcome == "ok" else {**place, "error.type": event.outcome}
        received.add(event.received, place)
        duration.record(event.ended_s - event.started_s, outcome)
        first_byte.record(event.first_byte_s - event.started_s, outcome)
        if event.attempt > 1:
            retries.add(1, place)

    add_observer(report)
    return lambda: remove_observer(report)


def _place(uri: str) -> dict[str, str]:
    parts = urlsplit(uri)
    return {"aws.s3.bucket": parts.netloc} if parts.scheme == "s3" else {"server.address": parts.hostname or ""}
