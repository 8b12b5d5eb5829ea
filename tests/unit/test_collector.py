from __future__ import annotations

import gc

import pytest

from mpreader.collector import collector_paused


def test_collector_is_paused_and_goes_on_after_an_error_too() -> None:
    was_enabled = []

    def fail() -> None:
        with collector_paused():
            was_enabled.append(gc.isenabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert was_enabled == [False]
    assert gc.isenabled()


def test_collector_that_the_program_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
