"""Versions of many objects: all are asked for at once, errors keep their places, and no caller waits too long."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from mpreader import MpreaderError, ObjectChanged, ObjectMissing, PoolClosed, PoolTimeout
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.sources.versions import SteadySource, resolve_versions, try_resolve_versions

_WAIT_S = 10


class _Source:
    """An object whose HEAD is answered by ``answer``."""

    max_attempts = 1
    version = None
    bucket = "bucket"

    def __init__(self, number: int, answer: Callable[[], ObjectVersion]) -> None:
        self.key = f"key-{number}"
        self.uri = f"s3://bucket/{self.key}"
        self._answer = answer

    def open(self) -> ObjectVersion:
        return self._answer()

    def route(self) -> Route:
        return Route(False, "host", 80, f"/{self.key}")


def _is_open() -> bool:
    return False


def _missing() -> ObjectVersion:
    raise ObjectMissing("there is no such object")


def test_resolve_versions_asks_for_all_at_once_and_keeps_their_order() -> None:
    everyone_asks = threading.Barrier(8)

    def answer(size: int) -> ObjectVersion:
        everyone_asks.wait(_WAIT_S)  # breaks, and so fails, unless eight are asked for at one time
        return ObjectVersion(size, f'"{size}"')

    sources = [_Source(number, lambda number=number: answer(number)) for number in range(16)]  # type: ignore[misc]
    pinned = resolve_versions(sources, math.inf, _is_open)
    assert [source.open() for source in pinned] == [ObjectVersion(size, f'"{size}"') for size in range(16)]
    assert [source.route() for source in pinned] == [source.route() for source in sources]


def test_resolve_versions_raises_an_error_without_waiting_for_the_others() -> None:
    may_end = threading.Event()
    hangs = _Source(0, lambda: (may_end.wait(_WAIT_S), ObjectVersion(0, ""))[1])
    try:
        with pytest.raises(ObjectMissing):
            resolve_versions([hangs, _Source(1, _missing)], math.inf, _is_open)
        assert not may_end.is_set()
    finally:
        may_end.set()


def test_try_resolve_versions_gives_errors_in_their_places() -> None:
    there = _Source(0, lambda: ObjectVersion(5, '"e"'))
    first, error, last = try_resolve_versions([there, _Source(1, _missing), there], math.inf, _is_open)
    assert isinstance(error, ObjectMissing)
    assert [getattr(found, "version", None) for found in (first, last)] == [ObjectVersion(5, '"e"')] * 2


@pytest.mark.parametrize("resolve", [resolve_versions, try_resolve_versions])
@pytest.mark.parametrize(("is_late", "kind"), [(True, PoolTimeout), (False, PoolClosed)])
def test_versions_are_not_waited_for_beyond_deadline_or_close(
    resolve: Callable[..., Any], is_late: bool, kind: type[MpreaderError]
) -> None:
    may_end = threading.Event()
    hangs = _Source(0, lambda: (may_end.wait(_WAIT_S), ObjectVersion(0, ""))[1])
    try:
        with pytest.raises(kind):
            resolve([hangs], time.monotonic() + 0.05 if is_late else math.inf, lambda: not is_late)
        assert not may_end.is_set()
    finally:
        may_end.set()


def test_versions_of_nothing_are_nothing() -> None:
    assert resolve_versions([], math.inf, _is_open) == try_resolve_versions([], math.inf, _is_open) == []


def test_steady_source_asks_once_and_stays_with_that_version() -> None:
    answers = iter([ObjectVersion(5, '"e"'), ObjectVersion(5, '"f"')])
    source = SteadySource(_Source(0, lambda: next(answers)))
    assert source.version is None
    assert [source.open(), source.open(), source.version] == [ObjectVersion(5, '"e"')] * 3
    source.learn(ObjectVersion(5, '"e"'))
    with pytest.raises(ObjectChanged, match="the object was overwritten while it was read"):
        source.learn(ObjectVersion(5, '"f"'))
    with pytest.raises(ObjectChanged, match="it has 6 bytes, not 5"):
        source.learn(ObjectVersion(6, '"e"'))
    assert source.version == ObjectVersion(5, '"e"')
