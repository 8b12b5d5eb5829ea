"""Arguments of a fetch call: options and ranges as callers give them, checked and brought into one form.

Both fetchers make :class:`FetchOptions` when a call begins; the engine turns ranges into :class:`~mpreader.ItemRange`.
Defaults and checks of the arguments are here and nowhere else. Nothing here asks a server for anything.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
Ranges = Iterable[RangeLike] | None  # None: one range, the whole object
StreamOrder = Literal["offset", "input", "completion"]

DEFAULT_STREAM_ORDER: Final[StreamOrder] = "offset"
# 1 MiB. Less than a load's bound: the bytes of a gap stay in memory as long as the views beside it are held.
DEFAULT_FETCH_GAP_SIZE: Final = gap_worth_receiving(request_s=0.012)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Options of one call, checked. Made when the call begins: that starts its clock.

    Args:
        timeout_s: Seconds for the whole call. None: no limit.
        max_gap_size: Largest gap, in bytes, between two ranges that are fetched as one.
        order: Order in which ranges are handed out. A fetch, which hands out all of them at once, takes them as they
            complete.

    Attributes:
        deadline: Moment at which the time is up, by the monotonic clock; infinity where there is no limit.

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
        # Written so that NaN is refused as well.
        if timeout_s is not None and (
            isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0
        ):
            raise ConfigError(f"timeout_s is a number of seconds above 0, or None, got {timeout_s!r}")
        check_max_gap(self.max_gap_size)
        if self.order not in get_args(StreamOrder):
            raise ConfigError(f'order is "offset", "input" or "completion", got {self.order!r}')
        # The class is frozen, so that threads can share its objects; only here may it be set.
        object.__setattr__(self, "deadline", math.inf if timeout_s is None else time.monotonic() + timeout_s)


def needs_size(ranges: Sequence[RangeLike] | None) -> bool:
    """Return True if the ranges mean bytes only once the size of their object is known."""
    return ranges is None or any(isinstance(item, tuple) and any(map(_is_from_end, item)) for item in ranges)


def to_item_ranges(ranges: Sequence[RangeLike] | None, size: int | None) -> list[ItemRange]:
    """Check ranges, and count those that are meant from the end of the object from its start.

    Args:
        ranges: The ranges as the caller gave them.
        size: Bytes of the object. None: not known, and ``needs_size`` returns False for the ranges.

    Raises:
        PlanError: A range is no pair of whole numbers with ``0 <= start <= end``.
    """
    if ranges is None:
        ranges = [(0, None)]
    if size is not None:
        ranges = [_from_start(item, size) for item in ranges]
    return [_to_item_range(item) for item in ranges]


def _is_from_end(limit: object) -> bool:
    return limit is None or (isinstance(limit, int) and limit < 0)


def _from_start(item: RangeLike, size: int) -> RangeLike:
    if not isinstance(item, tuple) or len(item) != 2:
        return item  # an ItemRange, or something that _to_item_range refuses
    # As in a slice: a start before the first byte means the first byte.
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
    """Make a plain int of any whole number, numpy's included.

    Raises:
        TypeError: It is no whole number; True and False are none either.
    """
    if isinstance(number, bool):
        raise TypeError(f"not a whole number: {number!r}")
    return operator.index(number)  # type: ignore[arg-type]  # raises for what has no index
