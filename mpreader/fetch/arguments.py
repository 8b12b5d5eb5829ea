"""Arguments of a fetch call: their types, their defaults and their checks, which are nowhere else.

Both fetchers make :class:`FetchOptions` when a call begins. The engine uses :func:`to_item_ranges` to turn the ranges
of a call into :class:`~mpreader.ItemRange`. This module must not make requests.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Final, Literal, get_args

from mpreader.errors import ConfigError, PlanError
from mpreader.ranges import ItemRange, check_max_gap, gap_worth_receiving

__all__ = [
    "DEFAULT_FETCH_GAP_SIZE",
    "DEFAULT_STREAM_ORDER",
    "FetchOptions",
    "RangeLike",
    "Ranges",
    "StreamOrder",
    "needs_size",
    "to_item_ranges",
]

RangeLike = ItemRange | tuple[int, int | None]
Ranges = Iterable[RangeLike] | None  # None means one range: the whole object
StreamOrder = Literal["offset", "input", "completion"]

DEFAULT_STREAM_ORDER: Final[StreamOrder] = "offset"
# 1 MiB, half of the bound for loads: the bytes of a gap occupy shared memory for as long as the caller holds the views
# beside it. A load copies the bytes and gives the memory back.
DEFAULT_FETCH_GAP_SIZE: Final = gap_worth_receiving(request_s=0.012)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Checked options of one call. It is made when the call begins, because ``timeout_s`` is counted from then on.

    Args:
        timeout_s: Seconds for the whole call. None: no limit.
        max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
        order: Order in which a stream hands out the ranges. A fetch returns all of them together, so it always takes
            them in the order ``"completion"``.

    Attributes:
        deadline: Time at which ``timeout_s`` has passed, by the monotonic clock; infinity if there is no limit.

    Raises:
        ConfigError: ``timeout_s`` is no number above 0, or ``order`` is not one of the three.
        TypeError: ``max_gap_size`` is not a number.
        ValueError: ``max_gap_size`` is negative.
    """

    timeout_s: float | None = None
    max_gap_size: float = DEFAULT_FETCH_GAP_SIZE
    order: StreamOrder = "completion"
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        timeout_s = self.timeout_s
        # "not timeout_s > 0" rather than "timeout_s <= 0", which would accept NaN. A bool is an int to Python.
        if timeout_s is not None and (
            isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0
        ):
            raise ConfigError(f"timeout_s is a number of seconds above 0, or None, got {timeout_s!r}")
        check_max_gap(self.max_gap_size)
        if self.order not in get_args(StreamOrder):
            raise ConfigError(f'order is "offset", "input" or "completion", got {self.order!r}')
        # Frozen dataclasses allow no assignment, not even of a field that is computed from the others.
        object.__setattr__(self, "deadline", math.inf if timeout_s is None else time.monotonic() + timeout_s)


def needs_size(ranges: Sequence[RangeLike] | None) -> bool:
    """Return True if a range counts from the end of the object, so that the object's size must be known."""
    return ranges is None or any(isinstance(item, tuple) and any(map(_is_from_end, item)) for item in ranges)


def to_item_ranges(ranges: Sequence[RangeLike] | None, size: int | None) -> list[ItemRange]:
    """Check ranges, and convert those that count from the end of the object.

    Args:
        ranges: The ranges as the caller gave them.
        size: Bytes of the object. None: not known, which is allowed if ``needs_size`` returns False for the ranges.

    Returns:
        The ranges in the order of the input, counted from the start of the object.

    Raises:
        PlanError: A range is not a pair of whole numbers with ``0 <= start <= end``.
    """
    if ranges is None:
        ranges = [(0, None)]
    if size is not None:
        ranges = [_from_start(item, size) for item in ranges]
    return [_to_item_range(item) for item in ranges]


def _is_from_end(limit: object) -> bool:
    # Integral, since the integers of numpy are none of Python's.
    return limit is None or (isinstance(limit, Integral) and int(limit) < 0)


def _from_start(item: RangeLike, size: int) -> RangeLike:
    if not isinstance(item, tuple) or len(item) != 2:
        return item  # an ItemRange, or something that _to_item_range refuses with an error of its own
    # As in a slice of Python, a start before the first byte means the first byte. An end before it stays negative, and
    # is refused later.
    start, end = (0 if item[0] is None else item[0]), (size if item[1] is None else item[1])
    return (max(0, size + start) if _is_from_end(start) else start), (size + end if _is_from_end(end) else end)


def _to_item_range(item: RangeLike) -> ItemRange:
    if isinstance(item, ItemRange):
        return item
    try:
        start, end = map(_to_int, item)
    except (TypeError, ValueError):
        raise PlanError(f"a range is a pair (start, end) of whole numbers or an ItemRange, got {item!r}") from None
    return ItemRange(start, end)


def _to_int(number: object) -> int:
    """Convert a whole number of any type, such as numpy's, to int.

    Raises:
        TypeError: It is not a whole number, or it is True or False.
    """
    if isinstance(number, bool):  # operator.index() would accept it
        raise TypeError(f"not a whole number: {number!r}")
    return operator.index(number)  # type: ignore[arg-type]  # raises TypeError for what is not a whole number
