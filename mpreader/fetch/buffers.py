"""The caller's own memory as flat, writable views: numpy arrays, CPU tensors, mmaps, bytearrays, memoryviews."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast

from mpreader.errors import PlanError

__all__ = ["targets_of"]


def targets_of(out: object, sizes: Sequence[int]) -> list[memoryview]:
    """A writable view for each range.

    Args:
        out: One buffer that takes the ranges one after the other, or a list of one for each.
        sizes: Bytes of each range.

    Raises:
        PlanError: The buffers have another size than the ranges.
        TypeError: Something is no contiguous, writable buffer in main memory.
    """
    if isinstance(out, (list, tuple)):
        views = [_flat(buffer) for buffer in out]
        if [view.nbytes for view in views] != list(sizes):
            raise PlanError(f"out has buffers of {[view.nbytes for view in views]} bytes, the ranges {list(sizes)}")
        return views
    whole = _flat(out)
    if whole.nbytes != sum(sizes):
        raise PlanError(f"out has {whole.nbytes} bytes, the ranges {sum(sizes)}")
    views, start = [], 0
    for size in sizes:
        views.append(whole[start : start + size])
        start += size
    return views


def _flat(buffer: Any) -> memoryview:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(buffer, torch.Tensor):
        if not buffer.is_cpu or not buffer.is_contiguous():
            raise TypeError("out needs a contiguous tensor on the CPU")
        # As bytes: numpy has no bfloat16, and a tensor no buffer.
        buffer = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    try:
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("it is read-only")
        return view.cast("B") if view.nbytes else memoryview(bytearray())
    except (TypeError, BufferError) as error:
        kind = type(cast("object", buffer)).__name__
        raise TypeError(f"out needs contiguous, writable buffers, got {kind}: {error}") from None
