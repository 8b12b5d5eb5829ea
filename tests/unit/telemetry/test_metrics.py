from __future__ import annotations

import sys

import pytest

from mpreader import ConfigError
from mpreader.telemetry.metrics import instrument


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpreader\[otel\]'"):
        instrument()
