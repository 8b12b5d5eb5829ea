"""Where the fills and parts of open transfers are: what the scheduler decides on."""

from __future__ import annotations

import enum

from mpreader.pool.coordinator.arena import Slot
from mpreader.pool.coordinator.resolver import SourceEntry
from mpreader.pool.transfer import Fill, FillPart, Transfer

__all__ = ["FillState", "FillStatus", "PartState", "Reading"]


class FillStatus(enum.Enum):
    """Where a fill is on its way."""

    PENDING = "pending"
    FILLING = "filling"
    READY = "ready"
    TAKEN = "taken"
    DROPPED = "dropped"  # discarded or failed; its slot comes back when its last part in flight has ended


class FillState:
    """A fill and where it is."""

    __slots__ = ("fill", "index", "open_parts", "reading", "short_since", "slot", "source", "status")

    def __init__(self, reading: Reading, index: int, fill: Fill, source: SourceEntry) -> None:
        self.reading = reading
        self.index = index
        self.fill = fill
        self.source = source
        self.status = FillStatus.PENDING
        self.slot: Slot | None = None
        self.open_parts = 0
        self.short_since: float | None = None  # when a consumer began to wait for memory


class PartState:
    """A part and how often it was tried."""

    __slots__ = (
        "attempts",
        "crashes",
        "deadline",
        "fill",
        "is_resigned",
        "last_failure",
        "number",
        "part",
        "received",
        "requests",
    )

    def __init__(self, number: int, fill: FillState, part: FillPart) -> None:
        self.number = number
        self.fill = fill
        self.part = part
        self.deadline = float("inf")  # set when it is first sent: a large fill's last part may wait for long
        self.received = 0
        self.requests = 0  # all of them; `attempts` begins anew when bytes have come
        self.attempts = 0
        self.crashes = 0
        self.is_resigned = False
        self.last_failure = ""

    @property
    def byte_range(self) -> tuple[int, int]:
        """[start, end) of the part in the object."""
        return self.part.start, self.part.end


class Reading:
    """A transfer that is open."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.fills: list[FillState] = []
        self.cursor = 0  # every fill before it has been started or dropped

    def next_pending(self) -> FillState | None:
        """The first fill that waits to be started."""
        while self.cursor < len(self.fills):
            fill = self.fills[self.cursor]
            if fill.status is FillStatus.PENDING:
                return fill
            self.cursor += 1
        return None
