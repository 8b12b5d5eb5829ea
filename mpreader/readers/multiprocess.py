"""Reader of one file whose bytes worker processes receive ahead of time.

It is used in two ways: as a file, by ``torch.load`` and by the storage reader of s3torchconnector, and through
:meth:`MultiprocessS3Reader.item` by the storage reader of mpreader, which decodes items where their bytes have arrived.

The bytes lie in slots of shared memory, one for each part of the read plan. A slot is received into again when the last
reference to its view is gone. The arena may have room for no more than the parts that are being read now, so nothing
here may refer to a view for longer than it is needed: a load would wait for memory that it holds itself.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from mpreader.errors import PlanError
from mpreader.ranges import ItemRange, Part, clusters, coverage
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader, writable_view
from mpreader.readers.dcp_optimized import FALLBACK_GUIDANCE
from mpreader.readers.intervals import Intervals

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["ItemView", "MultiprocessS3Reader", "PlannedReads"]

# An item of more parts gives each part back as soon as its bytes were read, so that the item's size does not matter.
_MOST_PARTS_HELD: Final = 4
# Nor may an item hold more than this share of the arena, of which a host may have less than its settings allow.
_MOST_OF_ARENA_HELD: Final = 1 / 8


class PlannedReads(Protocol):
    """Reads of a load plan as the reader of one of its files sees them; the constructor gives it a ``ReadAhead``."""

    @property
    def parts_by_file(self) -> Mapping[str, tuple[int, Sequence[Part]]]:
        """Parts of each file by URI, and the index of the slot read that brings the first of them."""

    @property
    def max_bytes(self) -> int:
        """Shared memory that the pool may reserve."""

    def take(self, index: int) -> memoryview:
        """Wait for a slot read and take it: a view of shared memory, the reader's until its last reference dies."""

    def discard(self, start: int, stop: int) -> None:
        """Say that the slot reads [start, stop) won't be taken any more."""

    def open_file(self) -> None:
        """Say that a reader begins."""

    def close_file(self, uri: str, *, has_failed: bool) -> None:
        """Say that a reader has ended."""


class MultiprocessS3Reader(S3Reader):
    """File over the ranges of one object that worker processes have read, or are about to.

    Reads must lie within the ranges, and move forwards from item to item; within an item they may go back and forth.
    Made by :class:`MultiprocessConstructor`.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        item_ranges: The ranges that will be read.
        get_object_info: Asks for the object's size.
        get_stream: Not used, as the bytes come from the pool; constructors of all readers are called alike.
        read_ahead: Reads of the load plan that these ranges are part of.

    Attributes:
        max_bytes: Shared memory that its pool may reserve.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
        *,
        read_ahead: PlannedReads,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._uri = f"s3://{bucket}/{key}"
        self._first_slot_read, parts = read_ahead.parts_by_file[self._uri]
        self._parts = Intervals(parts)
        self._covered = Intervals(coverage(item_ranges))
        # Items that overlap, joined: reading may go back to the start of an item, so no part of a cluster is given back
        # before reading has gone on to the next cluster.
        self._clusters = Intervals(clusters(item_ranges))
        self._held: dict[int, memoryview] = {}  # by index of the part, for another read of its bytes
        self._lowest = 0  # index of the first part that was not given back
        self._read_ahead = read_ahead
        self.max_bytes = read_ahead.max_bytes
        self._most_bytes_held = int(_MOST_OF_ARENA_HELD * self.max_bytes)
        read_ahead.open_file()
        self._has_failed = False

    # -- as a file

    def read(self, size: int | None = None) -> bytes:
        """Read exactly ``size`` bytes.

        Returns:
            A read-only memoryview of shared memory where the bytes lie in one part, valid until its last reference
            dies; bytes where they don't.

        Raises:
            TypeError: ``size`` is not a whole number.
            ValueError: ``size`` is None or negative, the bytes are not within the ranges or were given back already,
                or the reader is closed.
            MpreaderError: The bytes could not be had.
        """
        self._check_open()
        if size is None or size < 0:
            raise ValueError(f"a size is needed: this reader holds ranges, not the whole object. {FALLBACK_GUIDANCE}")
        pieces = list(self._pieces_at_position(size))
        self._position += size
        if len(pieces) == 1:
            return pieces[0].toreadonly()  # type: ignore[return-value]  # bytes-like, as documented
        return b"".join(pieces)

    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Fill ``buf``; raises what :meth:`read` raises."""
        self._check_open()
        target = writable_view(buf)
        done = 0
        for piece in self._pieces_at_position(len(target)):
            target[done : done + len(piece)] = piece
            done += len(piece)
        self._position += done
        return done

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position to any byte; an error of one that can't be read comes with the read."""
        self._position = self._seek_target(offset, whence)
        return self._position

    def close(self) -> None:
        """Give back what is held; views that were handed out stay valid. Idempotent."""
        if not self.closed:
            self._give_back_before(len(self._parts))
            self._read_ahead.close_file(self._uri, has_failed=self._has_failed)
        super().close()

    def __exit__(self, error_type: object, *_: object) -> None:
        # A load that has failed in one file won't open the others, so nobody else would end their downloads.
        self._has_failed = error_type is not None
        self.close()

    # -- as items, in place

    def item(self, offset: int, length: int) -> ItemView:
        """Returns the bytes of one item in place, without a copy.

        Args:
            offset: First byte of the item in the object.
            length: Number of its bytes.

        Raises:
            ValueError: The item is not within the ranges, or the reader is closed.
        """
        self._check_open()
        if length:
            self._check_covered(offset, offset + length)
            self._give_back_before(self._first_part_needed(offset))
        return ItemView(self, offset, length, keep=self._may_keep(offset, length))

    def refetch(self, offset: int, length: int) -> ItemView:
        """Returns the same as :meth:`item`, received once more: the parts that are held of it are dropped."""
        if length:
            for index in range(self._parts.index_at(offset), self._parts.index_at(offset + length - 1) + 1):
                self._held.pop(index, None)
        return self.item(offset, length)

    def pieces(self, start: int, end: int, *, keep: bool) -> Iterator[memoryview]:
        """Yields writable views of shared memory that together are the bytes [start, end) of the object, in order.

        Args:
            start: First byte; all bytes must be within the ranges.
            end: One past the last byte.
            keep: Hold on to the parts for a second reading; otherwise that downloads them again.
        """
        while start < end:
            index = self._parts.index_at(start)
            part = self._parts[index]
            stop = min(end, part.end)
            # The rest of the part will be read next, by this item or by another one.
            keep_part = keep or stop < part.end
            # No variable refers to the view: while the caller works, and when the next part is waited for, the slot
            # must be kept by nobody but the caller.
            yield self._view(index, keep_part)[start - part.start : stop - part.start]
            start = stop

    # -- parts

    def _view(self, index: int, keep: bool) -> memoryview:
        """Returns the part ``index``, waits for it if it is not held, and holds it afterwards if ``keep`` is True."""
        view = self._held.get(index)
        if view is None:
            view = self._read_ahead.take(self._first_slot_read + index)
        if keep:
            self._held[index] = view
        else:
            self._held.pop(index, None)
        return view

    def _pieces_at_position(self, size: int) -> Iterator[memoryview]:
        if not size:
            return iter(())
        start = self._position
        self._check_covered(start, start + size)
        first = self._first_part_needed(start)
        if first < self._lowest:
            raise ValueError(
                f"bytes {start}-{start + size} of {self._uri} were given back already: items must be read in the "
                f"order of their offsets. {FALLBACK_GUIDANCE}"
            )
        self._give_back_before(first)
        return self.pieces(start, start + size, keep=True)

    def _check_covered(self, start: int, end: int) -> None:
        if not self._covered.hold(start, end):
            raise ValueError(
                f"bytes {start}-{end} of {self._uri} are not within the ranges of the load plan. {FALLBACK_GUIDANCE}"
            )

    def _first_part_needed(self, position: int) -> int:
        """Returns the index of the first part that may still be read when reading has come to ``position``."""
        cluster = self._clusters[self._clusters.index_at(position)]
        return self._parts.index_at(cluster.start)

    def _may_keep(self, offset: int, length: int) -> bool:
        """Returns True if the item is so small that all of its parts may be held until reading goes on."""
        if length > self._most_bytes_held:
            return False
        return self._parts.index_at(offset + length - 1) - self._parts.index_at(offset) < _MOST_PARTS_HELD

    def _give_back_before(self, index: int) -> None:
        """Drop the parts before ``index``, and tell the pool that it need not receive those that have not arrived."""
        if index > self._lowest:
            self._held = {held: view for held, view in self._held.items() if held >= index}
            self._read_ahead.discard(self._first_slot_read + self._lowest, self._first_slot_read + index)
            self._lowest = index

    def _facts(self) -> str:
        return f" parts={len(self._parts)} held={len(self._held)}"


class ItemView:
    """Bytes of one item of a :class:`MultiprocessS3Reader`, in one or several parts.

    Args:
        reader: Has the parts.
        offset: First byte of the item in the object.
        length: Number of its bytes.
        keep: Hold on to its parts for a second reading.

    Attributes:
        size: Number of bytes of the item.
    """

    __slots__ = ("_keep", "_reader", "_start", "size")

    def __init__(self, reader: MultiprocessS3Reader, offset: int, length: int, *, keep: bool) -> None:
        self._reader = reader
        self._start = offset
        self._keep = keep
        self.size = length

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields writable views that together are the item's bytes [start, end), in order, without a copy.

        The slot of each is received into again when the caller's last reference to it is gone.

        Args:
            start: First byte, counted from the start of the item.
            end: One past the last byte.

        Raises:
            PlanError: Not within the item.
        """
        self._check(start, end)
        return self._reader.pieces(self._start + start, self._start + end, keep=self._keep)

    def view(self, start: int, end: int) -> memoryview:
        """Returns the item's bytes [start, end) in one piece: without a copy where they lie in one part.

        The view is the caller's until its last reference dies, and keeps the slot as long.

        Raises:
            PlanError: Not within the item.
        """
        pieces = list(self.pieces(start, end))
        return pieces[0] if len(pieces) == 1 else memoryview(bytearray().join(pieces))

    def _check(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self.size:
            raise PlanError(f"bytes {start}-{end} are not within an item of {self.size} bytes")
