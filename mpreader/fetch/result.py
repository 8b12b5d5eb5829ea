"""Results of a fetch: views of shared memory, or of the caller's own buffers, which are filled piece by piece.

Both fetchers put what arrives, in any order, into a :class:`FetchResult`. Buffers of the caller's may be anything that
is contiguous, writable and in main memory: numpy arrays, CPU tensors, mmaps, bytearrays, memoryviews.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from mpreader.errors import PlanError
from mpreader.fetch.plan import FetchPlan

__all__ = ["FetchResult", "result_of"]


def result_of(plan: FetchPlan, out: Mapping[str, object] | None) -> FetchResult:
    """Make the result of a fetch, still without bytes.

    Args:
        plan: Plan of the fetch. With ``out``, its ranges are cut into pieces.
        out: The caller's buffers by URI: one that takes all ranges of the source, one after the other, or a list of one
            for each. None: shared memory is handed out.

    Raises:
        PlanError: A buffer is missing, or has another size than its ranges.
        TypeError: A buffer is not contiguous, not writable, or not in main memory.
    """
    return FetchResult(plan) if out is None else _CopiedResult(plan, out)


class FetchResult:
    """Views of shared memory, one for each range; empty until the range arrives.

    Args:
        plan: Plan of the fetch.
    """

    def __init__(self, plan: FetchPlan) -> None:
        self._uris = plan.uris
        self._views = [[memoryview(b"")] * len(ranges) for ranges in plan.ranges]

    def put(self, source_index: int, index: int, view: memoryview) -> None:
        """Take a member of a batch.

        Args:
            source_index: Number of its source.
            index: Position of the range, or of the piece where ranges were cut.
            view: Its bytes.
        """
        self._views[source_index][index] = view

    def views_by_uri(self) -> dict[str, list[memoryview]]:
        """Return a view for each range, in the order of the input, by URI."""
        return dict(zip(self._uris, self._views, strict=True))


class _CopiedResult(FetchResult):
    """Views of the caller's buffers, to which pieces are copied."""

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
            return  # an empty range is not cut: it has no piece, and no origin
        range_index, offset = self._origins[source_index][index]
        self._views[source_index][range_index][offset : offset + len(view)] = view


def _views_of(out: object, sizes: Sequence[int]) -> list[memoryview]:
    """Return a writable view for each range, of one buffer for all or of a list of buffers."""
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
    torch = sys.modules.get("torch")  # not imported here: whoever has a tensor has imported it
    if torch is not None and isinstance(buffer, torch.Tensor):
        if not buffer.is_cpu or not buffer.is_contiguous():
            raise TypeError("out needs a contiguous tensor on the CPU")
        # By way of numpy, since a tensor is no buffer; as bytes, since numpy has no bfloat16.
        buffer = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    try:
        view = memoryview(buffer)
        if view.readonly:
            raise TypeError("it is read-only")
        # cast() refuses views of several dimensions without bytes.
        return view.cast("B") if view.nbytes else memoryview(bytearray())
    except (TypeError, BufferError) as error:
        kind = type(cast("object", buffer)).__name__
        raise TypeError(f"out needs contiguous, writable buffers, got {kind}: {error}") from None
