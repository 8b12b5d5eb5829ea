"""Views of the items of a file: their bytes in place, in the parts that a reader takes and holds.

:class:`~mpreader.readers.multiprocess.MultiprocessS3Reader` makes them, and the storage reader of mpreader decodes
tensors in them. They hold no part themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mpreader.errors import PlanError

__all__ = ["ItemView", "PartsReader", "SelectedItemView"]


class PartsReader(Protocol):
    """Reader of a file in parts, as far as views of its items need it. Positions count from the start of the object."""

    def pieces(self, start: int, end: int, *, keep: bool) -> Iterator[memoryview]:
        """Yields writable views that together are the bytes [start, end); ``keep`` holds them for a second reading."""

    def holds(self, start: int, end: int) -> bool:
        """Returns True if all bytes [start, end) can be read."""

    def release_before(self, position: int) -> None:
        """Give back the parts that end before the byte at ``position``."""


class ItemView:
    """Bytes of one item of a file, in one or several parts.

    Args:
        reader: Reader that takes and holds the parts.
        offset: First byte of the item in the object.
        length: Number of its bytes.
        keep: True: hold its parts for a second reading. False: a second reading downloads them again.

    Attributes:
        size: Number of bytes of the item.
    """

    __slots__ = ("_keep", "_reader", "_start", "size")

    def __init__(self, reader: PartsReader, offset: int, length: int, *, keep: bool) -> None:
        self._reader = reader
        self._start = offset
        self._keep = keep
        self.size = length

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields writable views that together are the item's bytes [start, end), in order, without a copy.

        The memory of a piece may be received into again when the caller's last reference to the piece is gone.

        Args:
            start: First byte, counted from the start of the item.
            end: One past the last byte.

        Raises:
            PlanError: The bytes are not within the item.
        """
        self._check(start, end)
        return self._reader.pieces(self._start + start, self._start + end, keep=self._keep)

    def view(self, start: int, end: int) -> memoryview:
        """Returns a writable view of the item's bytes [start, end), which is a copy if they lie in several parts.

        The view is the caller's until its last reference dies, and keeps its slot until then.

        Raises:
            PlanError: The bytes are not within the item.
        """
        pieces = list(self.pieces(start, end))
        # Joined to a bytearray rather than to bytes, so that this view is writable, too.
        return pieces[0] if len(pieces) == 1 else memoryview(bytearray().join(pieces))

    def _check(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self.size:
            raise PlanError(f"bytes {start}-{end} are not within an item of {self.size} bytes")


class SelectedItemView(ItemView):
    """Bytes of one item of which only parts are within the ranges of the reader. They are read forwards.

    What lies before the bytes that are asked for is given back at once: the runs of one item may be more than the
    arena has room for.
    """

    __slots__ = ()

    def holds(self, start: int, end: int) -> bool:
        """Returns True if all bytes [start, end) of the item can be read; there must be at least one."""
        return start >= 0 and end <= self.size and self._reader.holds(self._start + start, self._start + end)

    def _check(self, start: int, end: int) -> None:
        if start < end and not self.holds(start, end):
            raise PlanError(f"bytes {start}-{end} of an item of {self.size} bytes were not selected")
        self._reader.release_before(self._start + start)
