"""Fixtures of the tests of the command line."""

from __future__ import annotations

import pytest

from mpreader.pool.background import BackgroundThreads
from mpreader.pool.coordinator.halving import Halving
from mpreader.pool.coordinator.tail import SlowTail


@pytest.fixture
def _asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer may seem slow: nothing is cut, halved or asked for once more, or the log has more."""
    monkeypatch.setattr(SlowTail, "judge", lambda *_: [])
    monkeypatch.setattr(Halving, "choose", lambda *_: None)
    monkeypatch.setattr(BackgroundThreads, "_patience_s", lambda _: 600.0)
