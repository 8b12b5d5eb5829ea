"""Slots that the tensors of streams keep."""

from __future__ import annotations

import mmap

import numpy as np

from mpreader.pool.lease import leased_view
from mpreader.safetensors.leases import HeldSlots


def test_slots_count_until_their_last_view_is_gone_and_other_memory_never_does() -> None:
    held = HeldSlots()
    memory = mmap.mmap(-1, 8192)
    views = [leased_view(memory, start, 4096, 0, print)[0] for start in (0, 4096)]
    assert held.try_hold(views[0][:10], 4096)
    assert held.try_hold(views[0][10:], 4096), "the same slot"
    assert not held.try_hold(views[1], 4096)
    assert held.try_hold(np.empty(10_000, np.uint8).data, 4096), "memory of a local file is no slot"
    del views[0]
    assert held.try_hold(views[0], 4096)
