"""Shares: what the broker remembers of each slot that ranks share, and of each rank."""

from __future__ import annotations

from collections.abc import Callable

from mpreader.pool.hosts.messages import Subscription
from mpreader.pool.requests import ReadId, SegmentMemory, SlotArrived

__all__ = ["Post", "SharedSlot", "SharingRank"]

Post = Callable[[object, "SegmentMemory | None"], None]
"""Sends a message to a rank; with a MapSegment goes its memory."""


class SharedSlot:
    """A slot read of the union.

    Attributes:
        kept_by: The ranks that are not done with it.
        arrived: The slot, while the broker has it.
        holders: The ranks that have got it, and how many leases each of them has.
        demanded_s: Time since when a rank waits for it; None if none does.
        is_demanded: True if the coordinator was told that.
        is_recalled: True if the coordinator wants it back.
        is_taken: True if the coordinator was told that it can't have it back yet.
        was_taken: True if a consumer has taken it; if it is received once more, others get other bytes than that one.
    """

    __slots__ = ("arrived", "demanded_s", "holders", "is_demanded", "is_recalled", "is_taken", "kept_by", "was_taken")

    def __init__(self) -> None:
        self.kept_by: set[int] = set()
        self.arrived: SlotArrived | None = None
        self.holders: dict[int, int] = {}
        self.demanded_s: float | None = None
        self.is_demanded = self.is_recalled = self.is_taken = self.was_taken = False


class SharingRank:
    """A rank that takes part.

    Attributes:
        read: Name of its read.
        post: Sends it a message.
        indices: Its slot reads, among those of the union.
        own_index: For each of these, the rank's own index of it.
        sources: For each of its sources, by its index in the union, the rank's own index.
        leases: Leases that it has, and the slot reads that they are of.
        untaken: The slot reads that it has got, but no consumer has taken yet, and their leases.
        waits_for: Slot reads that it has demanded, and not got yet.
        is_closed: True when it takes no more.
    """

    def __init__(self, read: ReadId, post: Post, subscription: Subscription) -> None:
        indices = subscription.indices
        self.read = read
        self.post = post
        self.indices = indices
        self.own_index = {index: place for place, index in enumerate(indices)}
        self.sources = {index: place for place, index in enumerate(subscription.sources)}
        self.leases: dict[int, int] = {}
        self.untaken: dict[int, int] = {}
        self.waits_for: set[int] = set()
        self.is_closed = False

    @property
    def number(self) -> int:
        """Its number, for the server."""
        return self.read.caller

    @property
    def is_at_work(self) -> bool:
        """True if it is about to give memory back."""
        return bool(self.leases) and not self.waits_for
