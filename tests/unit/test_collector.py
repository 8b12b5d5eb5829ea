from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

import mpreader.collector
from mpreader.collector import collector_paused, spare_new_objects


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


@pytest.fixture
def _automatic_collections_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gc.unfreeze()  # the leak check has frozen what there was before the test
    monkeypatch.setattr(mpreader.collector, "_is_program_freezing", False)
    gc.disable()
    yield
    gc.enable()


class _Node:
    """Something that can be part of a cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("_automatic_collections_off")
def test_spared_objects_are_left_alone_until_everything_is_looked_at() -> None:
    gc.collect()
    garbage = weakref.ref(_Node())
    spare_new_objects()
    gc.collect(0)
    gc.collect(1)
    assert garbage() is not None
    gc.collect()
    assert garbage() is None


@pytest.mark.usefixtures("_automatic_collections_off")
def test_what_the_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        assert frozen > 4000, "the fewest that any program has"
        spare_new_objects()
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("_automatic_collections_off")
def test_program_that_has_frozen_objects_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    count = gc.get_freeze_count

    def ask() -> int:
        asked.append(count())
        return asked[-1]

    monkeypatch.setattr(gc, "get_freeze_count", ask)
    spare_new_objects()
    spare_new_objects()
    assert len(asked) == 2, "others may freeze theirs at any time"
    gc.freeze()
    try:
        spare_new_objects()
        spare_new_objects()
        assert len(asked) == 3
    finally:
        gc.unfreeze()
