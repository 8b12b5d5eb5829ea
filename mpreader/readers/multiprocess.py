"""Reader of one file whose bytes worker processes receive ahead of time.

It is made by :class:`~mpreader.readers.multiprocess_constructor.MultiprocessConstructor`, and used in two ways: as a
file, by ``torch.load`` and by the storage reader of s3torchconnector; and through :meth:`MultiprocessS3Reader.item`, by
the storage reader of mpreader, which decodes items in place. It makes no requests: it takes slot reads that others
began.

The bytes lie in slots of shared memory, one slot for each part of the file. A slot is received into again when the last
reference to its view is gone. The arena may have room for no more than the parts that are being read now. Therefore
this module must not refer to a view for longer than it is needed: a load would wait for memory that it holds itself.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from mpreader.ranges import ItemRange, Part, clusters, coverage
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader, writable_view
from mpreader.readers.dcp_optimized import FALLBACK_GUIDANCE
from mpreader.readers.intervals import Intervals
from mpreader.readers.item_view import ItemView, SelectedItemView

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["MultiprocessS3Reader", "PlannedReads"]

# An item of at most so many parts is held for a second reading of its bytes. A longer item gives each part back as soon
# as its bytes were read, so that it may be larger than the arena.
_MOST_PARTS_HELD: Final = 4
# Nor may an item hold more than this share of the arena: a host may have less shared memory than the settings allow.
_MOST_OF_ARENA_HELD: Final = 1 / 8
# A copy of at least so many bytes releases the GIL; for a shorter one, getting it back may take longer than the copy.
_LARGE_COPY_BYTES: Final = 256 * 1024


class _Near(NamedTuple):
    """Bytes that need no search: those of one part and of one cluster of items."""

    start: int
    end: int
    part: int  # its index
    part_start: int


_NOWHERE: Final = _Near(0, -1, 0, 0)  # holds no byte, nor the empty read at 0


class PlannedReads(Protocol):
    """Reads of a load plan, as far as the reader of one of its files needs them.

    :class:`~mpreader.readers.read_ahead.ReadAhead` satisfies it.
    """

    @property
    def parts_by_file(self) -> Mapping[str, tuple[int, Sequence[Part]]]:
        """Parts of each file by URI, with the index of the slot read of the first part; the others follow it."""

    @property
    def max_bytes(self) -> int:
        """Largest number of bytes of shared memory that the pool may reserve."""

    def take(self, index: int) -> memoryview:
        """Wait for a slot read and take it: a view of shared memory, the reader's until its last reference dies."""

    def discard(self, start: int, stop: int) -> None:
        """Tell the pool that the slot reads [start, stop) won't be taken any more."""

    def open_file(self) -> None:
        """Count a reader that was opened."""

    def close_file(self, uri: str, *, has_failed: bool) -> None:
        """Count a reader that was closed. ``has_failed``: its ``with`` block ended in an exception."""


class MultiprocessS3Reader(S3Reader):
    """File over the ranges of one object that worker processes receive.

    Reads must lie within the ranges, and must go forwards from item to item; within an item they may go back and forth.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        item_ranges: The ranges that will be read.
        get_object_info: Asks for the object's size.
        get_stream: Not used, because the bytes come from the pool. All kinds of readers are called with the same
            arguments.
        read_ahead: Reads of the load plan that these ranges are part of.

    Attributes:
        max_bytes: Largest number of bytes of shared memory that the pool may reserve.
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
        self._first_slot_read, parts = read_ahead.parts_by_file[self._uri]
        self._parts = Intervals(parts)
        self._covered = Intervals(coverage(item_ranges))
        # Items that overlap are joined to clusters. Reading may go back to the start of an item, so that no part of a
        # cluster is given back before reading has reached the next cluster.
        self._clusters = Intervals(clusters(item_ranges))
        self._held: dict[int, memoryview] = {}  # views of parts that may be read again, by index of the part
        self._was_taken = bytearray(len(parts))  # 1 for each part that was
        self._near = _NOWHERE  # where the last read began
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
            ValueError: ``size`` is None or negative, the bytes are not within the ranges, they lie before an item that
                was read later, or the reader is closed.
            MpreaderError: The bytes could not be fetched.
        """
        self._check_open()
        if size is None or size < 0:
            raise ValueError(f"a size is needed: this reader holds ranges, not the whole object. {FALLBACK_GUIDANCE}")
        pieces = self._pieces_at_position(size)
        piece = next(pieces, memoryview(b""))
        joined: bytes
        if len(piece) == size:
            # Read-only like bytes, because other reads of these bytes get the same memory.
            joined = piece.toreadonly()  # type: ignore[assignment]  # bytes-like, as documented
        else:
            copied = io.BytesIO()
            copied.write(piece)
            del piece  # not to be kept while the next one is waited for
            deque(map(copied.write, pieces), maxlen=0)
            joined = copied.getvalue()
        self._position += size  # only when all bytes are there: after an error the position is what it was
        return joined

    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Fill all of ``buf``. Raises the same errors as :meth:`read`."""
        target = writable_view(buf)
        size = len(target)
        # torch.load makes some twenty short reads for each tensor, nearly all of them near each other.
        near = self._piece_near(size)
        if near is not None:
            _copy(target, near)
        else:
            self._check_open()
            _fill(target, self._pieces_at_position(size))
        self._position += size
        return size

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position to any byte. Only the read checks if the byte lies within the ranges."""
        # The first case is what torch.load does, some twenty-five times for each tensor.
        if type(offset) is int and offset >= 0 and type(whence) is int and whence == io.SEEK_SET and not self.closed:
            self._position = offset
        else:
            self._position = self._seek_target(offset, whence)
        return self._position

    def close(self) -> None:
        """Give all parts back. Views that were handed out stay valid. Idempotent."""
        if not self.closed and hasattr(self, "_parts"):  # else __init__ has refused an argument
            self._give_back_before(len(self._parts))
            self._read_ahead.close_file(self._uri, has_failed=self._has_failed)
        super().close()

    def __exit__(self, error_type: object, *_: object) -> None:
        # A load that has failed in one file does not open the other files, whose readers would otherwise end the
        # downloads. This reader reports the failure, so that they end now.
        self._has_failed = error_type is not None
        self.close()

    # -- as items, in place

    def item(self, offset: int, length: int) -> ItemView:
        """Returns the bytes of one item in place, without a copy. Parts before the item are given back.

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

    def selected_item(self, offset: int, length: int, first: int) -> SelectedItemView:
        """Returns the bytes of one item of which only parts are within the ranges; see :meth:`item`.

        Args:
            offset: First byte of the item in the object.
            length: Number of its bytes.
            first: First of its bytes that will be read, counted from its start.

        Raises:
            ValueError: That byte is not within the ranges, or the reader is closed.
        """
        self._check_open()
        self._check_covered(offset + first, offset + first + 1)
        self._give_back_before(self._first_part_needed(offset + first))
        return SelectedItemView(self, offset, length, keep=False)

    def refetch(self, offset: int, length: int) -> ItemView:
        """Returns the same as :meth:`item`, but the bytes are received again.

        Used when the checksum of an item is wrong: the bytes may have been damaged on the way.
        """
        if length:
            # A part that is not held is read once more by taking it once more.
            for index in range(self._parts.index_at(offset), self._parts.index_at(offset + length - 1) + 1):
                self._held.pop(index, None)
        return self.item(offset, length)

    def pieces(self, start: int, end: int, *, keep: bool) -> Iterator[memoryview]:
        """Yields writable views of shared memory that together are the bytes [start, end) of the object, in order.

        Args:
            start: First byte; all bytes must be within the ranges.
            end: One past the last byte.
            keep: True: hold the parts for a second reading. False: a second reading downloads them again.
        """
        while start < end:
            index = self._parts.index_at(start)
            part = self._parts[index]
            stop = min(end, part.end)
            # A part whose end was not reached is needed for the bytes that follow, of this item or of the next one.
            keep_part = keep or stop < part.end
            # No variable refers to the view. While the caller works on it, and while the next part is waited for, only
            # the caller may keep the slot.
            yield self._view(index, keep_part)[start - part.start : stop - part.start]
            start = stop

    def holds(self, start: int, end: int) -> bool:
        """Returns True if all bytes [start, end) of the object are within the ranges; there must be at least one."""
        return self._covered.hold(start, end)

    def release_before(self, position: int) -> None:
        """Give back the parts that end before the byte at ``position``, if they are held.

        A later reading of them downloads them again.
        """
        index = self._parts.index_at(position)
        if any(held < index for held in self._held):
            self._held = {held: view for held, view in self._held.items() if held >= index}

    # -- parts

    def _view(self, index: int, keep: bool) -> memoryview:
        """Returns the view of the part ``index``, which is taken if it is not held, and held afterwards if ``keep``."""
        view = self._held.get(index)
        if view is None:
            view = self._read_ahead.take(self._first_slot_read + index)
            self._was_taken[index] = True
        if keep:
            self._held[index] = view
        else:
            self._held.pop(index, None)
        return view

    def _pieces_at_position(self, size: int) -> Iterator[memoryview]:
        """Check a read of ``size`` bytes at the position, and return their pieces."""
        if not size:
            return iter(())
        start = self._position
        self._check_covered(start, start + size)
        cluster = self._clusters[self._clusters.index_at(start)]
        first = self._parts.index_at(cluster.start)
        if first < self._lowest:
            raise ValueError(
                f"bytes {start}-{start + size} of {self._uri} were given back already: items must be read in the "
                f"order of their offsets. {FALLBACK_GUIDANCE}"
            )
        self._give_back_before(first)
        begun = self._parts.index_at(start)
        part = self._parts[begun]
        self._near = _Near(max(part.start, cluster.start), min(part.end, cluster.end), begun, part.start)
        # Of a large tensor, torch.load reads the directory, which is at the end, then the bytes in one read. The parts
        # where a read begins or ends are needed again, for other entries of the directory; those between them are not.
        begun_end = min(part.end, start + size)
        keep = self._may_keep(cluster.start, cluster.size)
        return chain(self.pieces(start, begun_end, keep=True), self.pieces(begun_end, start + size, keep=keep))

    def _piece_near(self, size: int) -> memoryview | None:
        """Return the next ``size`` bytes if they are held, and near those that were read last; else None."""
        start = self._position
        near_start, near_end, part, part_start = self._near
        if near_start <= start and start + size <= near_end:
            view = self._held.get(part)  # none are held when the reader is closed
            if view is not None:
                return view[start - part_start : start - part_start + size]
        return None

    def _check_covered(self, start: int, end: int) -> None:
        if not self._covered.hold(start, end):
            raise ValueError(
                f"bytes {start}-{end} of {self._uri} are not within the ranges of the load plan. {FALLBACK_GUIDANCE}"
            )

    def _first_part_needed(self, position: int) -> int:
        """Returns the index of the first part that may still be read after a byte at ``position`` was read."""
        cluster = self._clusters[self._clusters.index_at(position)]
        return self._parts.index_at(cluster.start)

    def _may_keep(self, offset: int, length: int) -> bool:
        """Returns True if the item is small enough for all of its parts to be held at the same time."""
        if length > self._most_bytes_held:
            return False
        return self._parts.index_at(offset + length - 1) - self._parts.index_at(offset) < _MOST_PARTS_HELD

    def _give_back_before(self, index: int) -> None:
        """Drop the parts before ``index``, and tell the pool not to receive those of them that have not arrived."""
        if index > self._lowest:
            self._held = {held: view for held, view in self._held.items() if held >= index}
            self._near = _NOWHERE
            # Usually there is none. Telling it wakes another thread, which then has the GIL.
            left = self._was_taken.find(False, self._lowest, index)
            if left >= 0:
                self._read_ahead.discard(self._first_slot_read + left, self._first_slot_read + index)
            self._lowest = index

    def _facts(self) -> str:
        return f" parts={len(self._parts)} held={len(self._held)}"


def _fill(target: memoryview, pieces: Iterator[memoryview]) -> None:
    """Copy the pieces, which together are as long as ``target``, into it one after the other."""
    done = 0

    # A function for the deque to call, in place of the body of a loop, whose variable would hold one piece while it
    # waits for the next one.
    def append(piece: memoryview) -> None:
        nonlocal done
        end = done + len(piece)
        _copy(target[done:end], piece)
        done = end

    deque(map(append, pieces), maxlen=0)


def _copy(target: memoryview, piece: memoryview) -> None:
    """Copy a piece into a target of its size."""
    if len(piece) < _LARGE_COPY_BYTES:
        target[:] = piece
        return
    import numpy as np  # imported already, by whoever made the piece

    # numpy's copy releases the GIL, which the pool's threads need to keep the workers busy.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(piece, np.uint8))
