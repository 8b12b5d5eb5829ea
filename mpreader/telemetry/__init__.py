"""What is told of the work: events of requests, timelines, OpenTelemetry metrics, progress bars."""

from __future__ import annotations

from mpreader.telemetry.metrics import instrument

__all__ = ["instrument"]
