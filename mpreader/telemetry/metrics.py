"""OpenTelemetry metrics of the loads and of the requests of all worker pools of this process.

========================================  =========  =========================================================
``mpreader.received``                     counter    bytes received, over-read and repeated ones included (By)
``mpreader.loaded``                       counter    bytes of items loaded, by ``mpreader.verified`` (By)
``mpreader.requests``                     counter    requests, by ``mpreader.outcome`` ({request})
``mpreader.retries``                      counter    requests for bytes of which one had failed before ({request})
``mpreader.request.duration``             histogram  from a request to its last byte or its failure (s)
``mpreader.request.time_to_first_byte``   histogram  from a request to its answer, where there was one (s)
========================================  =========  =========================================================

The other attributes are those of OpenTelemetry's conventions: ``aws.s3.bucket``, or ``server.address`` and
``server.port`` of an http(s) URL; ``error.type`` where a request failed. A request that was cut, since it was much
slower than others, has the outcome ``slow``, and is no failure. ``mpreader.verified`` is true of items whose checksum
was compared, false of the others, such as those of which a part was received. Keys of objects are not attributes: each
key would be a time series of its own.

Programs call :func:`instrument`. OpenTelemetry is optional, and must not be imported before that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mpreader.errors import ConfigError
from mpreader.telemetry.events import (
    LoadEvent,
    RequestEvent,
    add_load_observer,
    add_observer,
    remove_load_observer,
    remove_observer,
)

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram, Meter, MeterProvider

__all__ = ["instrument"]

# The boundaries of OpenTelemetry's conventions for HTTP, and some more. Its default boundaries would be wrong: they are
# meant for milliseconds.
_BOUNDARIES_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    30,
    60,
)
_PORTS: Final = {"http": 80, "https": 443}

_lock = threading.Lock()  # guards _reports, and the users of each report
_reports: list[_Report] = []


def instrument(meter_provider: MeterProvider | None = None) -> Callable[[], None]:
    """Report every request of every worker pool, and every load, of this process from now on.

    A provider gets each of them once, however often this is called for it, until the last of the calls is ended: two
    libraries of one program may both call it.

    Args:
        meter_provider: Provider that gets the metrics. None: OpenTelemetry's global one, also if that is set later.

    Returns:
        Function that ends the reports of this call; idempotent.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.metrics import get_meter_provider
    except ImportError:
        raise ConfigError("metrics need OpenTelemetry: pip install 'mpreader[otel]'") from None
    with _lock:
        # A report of the global provider (None) is compared by what that is now: it may have been set since.
        wanted = meter_provider or get_meter_provider()
        same = (report for report in _reports if (report.meter_provider or get_meter_provider()) is wanted)
        report = next(same, None) or _Report(meter_provider)
        if not report.users:
            _reports.append(report)
            add_observer(report)
            add_load_observer(report.add_load)
        # A token, not a count: a second call of end() finds it gone, and so ends nothing twice.
        user = object()
        report.users.add(user)

    def end() -> None:
        with _lock:
            report.users.discard(user)
            if not report.users and report in _reports:
                _reports.remove(report)
                remove_observer(report)
                remove_load_observer(report.add_load)

    return end


class _Report:
    """Observer of requests and loads that reports them to one provider.

    Attributes:
        meter_provider: The provider; None: the global one.
        users: A token for each call of :func:`instrument` that has not been ended.
    """

    def __init__(self, meter_provider: MeterProvider | None) -> None:
        from opentelemetry.metrics import get_meter

        from mpreader.version import __version__

        self.meter_provider = meter_provider
        self.users: set[object] = set()
        meter = get_meter("mpreader", __version__, meter_provider)
        self._received = meter.create_counter("mpreader.received", "By", "Bytes received")
        self._loaded = meter.create_counter("mpreader.loaded", "By", "Bytes of items loaded")
        self._requests = meter.create_counter("mpreader.requests", "{request}", "Requests made")
        self._retries = meter.create_counter("mpreader.retries", "{request}", "Requests made again")
        self._duration = _histogram(meter, "mpreader.request.duration", "From a request to its last byte")
        self._first_byte = _histogram(meter, "mpreader.request.time_to_first_byte", "From a request to its answer")

    def __call__(self, event: RequestEvent) -> None:
        is_ok = event.outcome in ("ok", "slow")
        place = _place(event.uri)
        # Bytes and retries are counted for each place only; requests and durations also for each kind of failure.
        result = place if is_ok else {**place, "error.type": event.outcome}
        self._received.add(event.received, place)
        self._requests.add(1, {**result, "mpreader.outcome": event.outcome})
        if event.attempt > 1:
            self._retries.add(1, place)
        self._duration.record(event.ended_s - event.started_s, result)
        # A request that got no response has no time to its first byte: its first_byte_s is its ended_s.
        if event.outcome == "ok" or event.first_byte_s < event.ended_s:
            self._first_byte.record(event.first_byte_s - event.started_s, result)

    def add_load(self, event: LoadEvent) -> None:
        """Report a load."""
        place = _place(event.uri)
        for is_verified, nbytes in ((True, event.verified_bytes), (False, event.unverified_bytes)):
            if nbytes:
                self._loaded.add(nbytes, {**place, "mpreader.verified": is_verified})


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    try:
        return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_BOUNDARIES_S)
    except TypeError:  # an OpenTelemetry that does not know of boundaries yet
        return meter.create_histogram(name, "s", description)


def _place(uri: str) -> dict[str, str | int]:
    """Attributes that name the server, or the bucket, that a request went to."""
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        return {"aws.s3.bucket": parts.netloc}
    return {"server.address": parts.hostname or "", "server.port": parts.port or _PORTS[parts.scheme]}
