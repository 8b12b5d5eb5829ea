"""Telemetry: request events, timelines, OpenTelemetry metrics, progress bars.

A pool reports its requests to the observers of :mod:`mpreader.telemetry.events`, and works the same if there are none.
Readers, fetchers and commands show progress bars. Nothing here may change or fail the work that it watches.
"""

from __future__ import annotations

from mpreader.telemetry.metrics import instrument

__all__ = ["instrument"]
