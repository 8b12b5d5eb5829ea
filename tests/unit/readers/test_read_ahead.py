"""Tests of how a read-ahead begins, without a pool."""

from __future__ import annotations

import types
from typing import Any

import pytest

from mpreader import ItemRange
from mpreader.readers import read_ahead
from mpreader.readers.read_ahead import ReadAhead


@pytest.mark.row("Ctrl-C")
@pytest.mark.parametrize("step", ["progress_bar", "use_shared_pool"])
def test_load_that_is_interrupted_as_it_begins_leaves_no_read(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[object] = []

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    pool: Any = types.SimpleNamespace(
        sizes=types.SimpleNamespace(part_bytes=100, max_bytes=1000), read=lambda *args, **_: reads.append(args)
    )
    monkeypatch.setattr(read_ahead, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ReadAhead.of_pool(pool, {}, {"s3://bucket/key": [ItemRange(0, 10)]}, 0.0)
    assert not reads, "nobody would close it"
