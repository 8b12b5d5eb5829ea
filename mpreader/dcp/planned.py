"""Planned items: what a load plan wants of stored items, with all that is known of them before their bytes are.

The planners of a load make them, alone or for the ranks of a host, and the loader of items takes them.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from torch.distributed.checkpoint.planner import ReadItem

from mpreader.formats.layout import TensorLayout
from mpreader.formats.selection import Selection
from mpreader.readers.protocols import StoredItem

__all__ = ["OWN_CHECK", "Check", "PlannedItem", "RawItem", "Verdict"]


class Verdict(NamedTuple):
    """Name of what one rank of the host says, to all of them, of an item that it compares with its checksum.

    Attributes:
        place: Place of that rank among those that load together.
        number: Number of the verdict.
    """

    place: int
    number: int


class Check(NamedTuple):
    """Assignment of an item to the rank that compares it with its checksum.

    It counts where checks are asked for, and all of the item is received.

    Attributes:
        is_own: True if this rank does.
        verdict: What others hear of it, or this rank from another one; None: no rank relies on another.
    """

    is_own: bool
    verdict: Verdict | None


OWN_CHECK: Final = Check(is_own=True, verdict=None)


class RawItem(NamedTuple):
    """Location of an item that is the bytes of a tensor and nothing else: it has no record around it, and no checksum.

    It is a :class:`~mpreader.readers.protocols.StoredItem`.

    Attributes:
        relative_path: Path of its file, relative to the checkpoint.
        offset: First byte in the file.
        length: Number of bytes.
        layout: Layout of the tensor in these bytes.
    """

    relative_path: str
    offset: int
    length: int
    layout: TensorLayout


class PlannedItem(NamedTuple):
    """Item of a load plan, and its location in the checkpoint.

    Attributes:
        request: The plan's entry: the name of the item, and which box of it is wanted.
        stored: File, offset and length of the item.
        selection: What is received of it; None: all of it.
        layout: Layout of its tensor, if that is known already; else it is read from the front.
        check: Who verifies it.
    """

    request: ReadItem
    stored: StoredItem
    selection: Selection | None = None
    layout: TensorLayout | None = None
    check: Check = OWN_CHECK
