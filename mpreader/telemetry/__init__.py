"""Telemetry: request events, timelines, OpenTelemetry metrics, progress bars. No pool depends on any of it."""

from __future__ import annotations

from mpreader.telemetry.metrics import instrument

__all__ = ["instrument"]
