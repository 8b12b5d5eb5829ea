"""Results of a fetch: collect the bytes that arrive, as views of shared memory or in buffers of the caller.

Both fetchers put each piece into a :class:`FetchResult` as it arrives, in any order. A buffer of the caller may be
anything that is contiguous, writable and in main memory: a numpy array, CPU tensor, mmap, bytearray or memoryview. This
module must not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mpreader.errors import PlanError
from mpreader.fetch.plan import FetchPlan

__all__ = ["FetchResult", "result_of"]


def result_of(plan: FetchPlan, out: Mapping[str, object] | None) -> FetchResult:
    """Make the result of a fetch, without any bytes yet.

    Args:
        plan: Plan of the fetch. With ``out``, its ranges must have been cut into pieces.
        out: The caller's buffers by URI: one buffer, which takes all ranges of the source one after the other, or a
            list with a buffer for each range. None: views of shared memory are returned.

    Raises:
        PlanError: A buffer is missing, or has another size than its ranges.
        TypeError: A buffer is not contiguous, not writable, or not in main memory.
    """
    return FetchResult(plan) if out is None else _CopiedResult(plan, out)


class FetchResult:
    """Views of shared memory, one for each range. A view is empty until its range arrives.

    Args:
        plan: Plan of the fetch.
    """

    def __init__(self, plan: FetchPlan) -> None:
        self._uris = plan.uris
        # Ranges without bytes keep the empty view: no slot read brings them.
        self._views = [[memoryview(b"")] * len(ranges) for ranges in plan.ranges]

    def put(self, source_index: int, index: int, view: memoryview) -> None:
        """Store one piece.

        Args:
            source_index: Number of its source in the plan.
            index: Position of the range among those of its source; if ranges were cut, position of the piece.
            view: Its bytes, in shared memory.
        """
        self._views[source_index][index] = view

    def views_by_uri(self) -> dict[str, list[memoryview]]:
        """Return a view for each range, in the order of the input, by URI."""
        return dict(zip(self._uris, self._views, strict=True))


class _CopiedResult(FetchResult):
    """Views of the caller's buffers. Pieces are copied there, so that their shared memory can be used again at once."""

    def __init__(self, plan: FetchPlan, out: Mapping[str, object]) -> None:
        super().__init__(plan)
        missing = [uri for uri in plan.uris if uri not in out]
        if missing:
            raise PlanError(f"out has no entry for {missing[0]!r}")
        self._views = [
            _views_of(out[uri], [item_range.size for item_range in ranges])
            for uri, ranges in zip(plan.uris, plan.ranges, strict=True)
        ]
        self._origins = plan.origins

    def put(self, source_index: int, index: int, view: memoryview) -> None:
        if not view.nbytes:
            return  # an empty range is not cut into pieces, so that index is not one of a piece
        range_index, offset = self._origins[source_index][index]
        self._views[source_index][range_index][offset : offset + len(view)] = view


def _views_of(out: object, sizes: Sequence[int]) -> list[memoryview]:
    """Return a writable view for each range; ``out`` is one buffer for all of them or a list of buffers."""
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
    """Return a writable view of the bytes of a buffer or a tensor."""
    torch = sys.modules.get("torch")  # a program that passes a tensor has imported torch; others need not wait for it
    if torch is not None and isinstance(buffer, torch.Tensor):
        if not buffer.is_cpu or not buffer.is_contiguous():
            raise TypeError("out needs a contiguous tensor on the CPU")
        # A tensor does not support the buffer protocol, but its numpy array does. It is viewed as uint8 first, because
        # numpy has no bfloat16.
        buffer = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    try:
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("it is read-only")
        # cast() refuses a view of several dimensions that has no bytes.
        return view.cast("B") if view.nbytes else memoryview(bytearray())
    except (TypeError, BufferError) as error:
        kind = type(cast("object", buffer)).__name__
        raise TypeError(f"out needs contiguous, writable buffers, got {kind}: {error}") from None
