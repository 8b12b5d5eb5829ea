"""Leases: their end is noticed, neither too early nor too late, whatever was made from the view."""

from __future__ import annotations

import gc
import mmap
import signal
from collections import deque

import numpy as np
import pytest
import torch

from mpreader.config import KiB
from mpreader.pool.lease import Lease, leased_view


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 256 * KiB)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda view: view, id="view"),
        pytest.param(lambda view: view[10:20][2:4], id="slice of a slice"),
        pytest.param(lambda view: np.frombuffer(view, np.uint8), id="numpy array"),
        pytest.param(lambda view: np.frombuffer(view[64:], np.int64)[1:3].reshape(2, 1), id="numpy view of a view"),
        pytest.param(lambda view: torch.frombuffer(view, dtype=torch.uint8), id="torch tensor"),
        pytest.param(lambda view: torch.frombuffer(view[:512], dtype=torch.float32)[1:2].view(1, 1), id="torch view"),
        pytest.param(lambda view: view.cast("i")[1:2].toreadonly(), id="cast, read-only"),
    ],
)
def test_lease_ends_only_with_the_last_thing_made_from_it(memory: mmap.mmap, use: object) -> None:
    ended: list[Lease] = []
    view, lease = leased_view(memory, 64 * KiB, 64 * KiB, 7, ended.append)
    last = use(view)  # type: ignore[operator]
    del view
    gc.collect(0)
    assert not ended
    del last
    assert ended == [lease]
    assert lease.number == 7


@pytest.mark.row("views held while the load goes on; close with live views")
def test_lease_view_shows_its_piece_and_keeps_the_memory_mapped() -> None:
    memory = mmap.mmap(-1, 256 * KiB)
    memory[64 * KiB : 64 * KiB + 5] = b"stays"
    view, lease = leased_view(memory, 64 * KiB, 5, 1, lambda _: None)
    with pytest.raises(BufferError):
        memory.close()
    del memory
    gc.collect(0)
    assert bytes(view) == b"stays"
    view[:1] = b"S"  # it may be written to
    assert lease() is not None


@pytest.mark.row("Ctrl-C")
def test_ctrl_c_is_not_lost_at_the_end_of_a_lease(memory: mmap.mmap, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraisable: lost.append(unraisable.exc_value))
    ended: deque[Lease] = deque(maxlen=1)
    caught = 0
    gc.disable()  # who runs Python code at its beginning and end loses a Ctrl-C there
    before = signal.signal(signal.SIGPROF, signal.default_int_handler)  # Ctrl-C's handler, for a timer's signal
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_PROF, 0.0015)
                for _ in range(100_000):  # a tenth of a second
                    view, lease = leased_view(memory, 0, 64 * KiB, 1, ended.append)
                    del view  # while the lease is there to notice it
                del lease
            except KeyboardInterrupt:  # noqa: PERF203  # that is what is counted
                caught += 1
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        gc.enable()
    assert not lost
    assert caught > 190
