"""Index expressions: the box of a tensor that ``[…]`` asks for, before any byte of it is received. Pure."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

from mpreader.errors import PlanError
from mpreader.formats.selection import Box

__all__ = ["BoxIndex", "box_index"]

_Entry = int | slice | EllipsisType


class BoxIndex(NamedTuple):
    """Box that an index expression needs.

    Attributes:
        offsets: First index in each dimension.
        lengths: Length in each dimension.
        rest: What is applied to the box to have what was asked for; () if it is the box itself.
    """

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    rest: tuple[int | slice, ...] = ()

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> BoxIndex:
        """Return the box of a whole tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def box(self) -> Box:
        """First index and length in each dimension."""
        return tuple(zip(self.offsets, self.lengths, strict=True))


def box_index(index: Any, shape: Sequence[int]) -> BoxIndex:
    """Find the box of an index expression.

    Args:
        index: What stands between the brackets: whole numbers and slices of a positive step, as for a tensor of torch,
            with ``...`` at most once.
        shape: Shape of the tensor.

    Raises:
        PlanError: The expression is of another kind.
        IndexError: An index is outside of the tensor, or there are more than the tensor has dimensions.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    rest: list[int | slice] = []
    for entry, size in zip(_one_for_each(index, shape), shape, strict=True):
        if isinstance(entry, slice):
            start, stop, step = _bounds(entry, size)
            count = len(range(start, stop, step))
            offsets.append(start if count else 0)
            lengths.append((count - 1) * step + 1 if count else 0)
            rest.append(slice(None, None, step))
        else:
            if not -size <= entry < size:
                raise IndexError(f"index {entry} is outside of a dimension of {size}")
            offsets.append(entry % size)
            lengths.append(1)
            rest.append(0)
    is_box = all(isinstance(entry, slice) and entry.step == 1 for entry in rest)
    return BoxIndex(tuple(offsets), tuple(lengths), () if is_box else tuple(rest))


def _one_for_each(index: Any, shape: Sequence[int]) -> list[int | slice]:
    """Return one entry for each dimension."""
    entries: list[_Entry] = [_entry(entry) for entry in (index if isinstance(index, tuple) else (index,))]
    places = [place for place, entry in enumerate(entries) if entry is ...]
    if len(places) > 1:
        raise PlanError("an index has '...' at most once")
    place = places[0] if places else len(entries)
    before, after = entries[:place], entries[place + 1 :]
    missing = len(shape) - len(before) - len(after)
    if missing < 0:
        raise IndexError(f"too many indices for a tensor of shape {list(shape)}")
    return [entry for entry in (*before, *[slice(None)] * missing, *after) if entry is not ...]


def _entry(entry: Any) -> _Entry:
    if isinstance(entry, (slice, EllipsisType)):
        return entry
    try:
        if isinstance(entry, bool):
            raise TypeError
        return operator.index(entry)
    except TypeError:
        raise PlanError(f"an index is made of whole numbers, slices and '...', got {entry!r}") from None


def _bounds(entry: slice, size: int) -> tuple[int, int, int]:
    try:
        start, stop, step = entry.indices(size)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{entry!r}: {error}") from None
    if step < 0:
        raise PlanError(f"{entry!r}: the step must be positive, as for a tensor of torch")
    return start, stop, step
