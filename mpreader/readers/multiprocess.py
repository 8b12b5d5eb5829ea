"""The reader of one file whose bytes worker processes receive ahead of time, and its items in place."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from mpreader.errors import PlanError
from mpreader.ranges import ItemRange, clusters, coverage
from mpreader.readers.base import S3Reader, writable_view
from mpreader.readers.dcp_optimized import FALLBACK_GUIDANCE
from mpreader.readers.protocols import GetObjectInfo, GetStream

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from mpreader.readers.read_ahead import ReadAhead

__all__ = ["ItemView", "MultiprocessS3Reader"]

# An item of more parts than this gives each back when it was read, so that its size does not matter.
_MOST_PARTS_HELD: Final = 4


class MultiprocessS3Reader(S3Reader):
    """File over the ranges of one object that worker processes have read, or are about to.

    Reads must lie within the ranges, and move forwards from item to item; within an item they may go back and forth.
    Made by :class:`MultiprocessConstructor`.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        item_ranges: The ranges that will be read.
        get_object_info: Asks for the object's size.
        get_stream: Not used: the bytes come from the pool.
        read_ahead: The parts on their way.

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
        read_ahead: ReadAhead,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._uri = f"s3://{bucket}/{key}"
        self._first_fill, self._parts = read_ahead.parts_by_file[self._uri]
        self._part_starts = [part.start for part in self._parts]
        self._covered = coverage(item_ranges)
        self._covered_starts = [interval.start for interval in self._covered]
        # What must be held together: reading may go back to the start of an item, and items may overlap.
        self._clusters = clusters(item_ranges)
        self._cluster_starts = [cluster.start for cluster in self._clusters]
        self._held: dict[int, memoryview] = {}
        self._lowest = 0  # parts before it were given back
        self._read_ahead = read_ahead
        self.max_bytes = read_ahead.max_bytes
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
        """Move the position; whether it can be read from is seen when it is read."""
        self._position = self._seek_target(offset, whence)
        return self._position

    def close(self) -> None:
        """Give back what is held; views that were handed out stay valid. Idempotent."""
        if not self.closed:
            self._held.clear()
            self._give_back_before(len(self._parts))
            self._read_ahead.close_file(self._uri, has_failed=self._has_failed)
        super().close()

    def __exit__(self, error_type: object, *_: object) -> None:
        # A load that failed in one file won't open the others: their downloads must end, too.
        self._has_failed = error_type is not None
        self.close()

    # -- as items in place

    def item(self, offset: int, length: int) -> ItemView:
        """The bytes of one item in place, without a copy.

        Args:
            offset: Its first byte in the object.
            length: Its number of bytes.

        Raises:
            ValueError: It is not within the ranges, or the reader is closed.
        """
        self._check_open()
        if length:
            self._check_covered(offset, offset + length)
            self._give_back_before(self._part_at(self._cluster_start(offset)))
        return ItemView(self, offset, length)

    def refetch(self, offset: int, length: int) -> ItemView:
        """The same as :meth:`item`, received once more: what is held of it is dropped."""
        if length:
            for index in range(self._part_at(offset), self._part_at(offset + length - 1) + 1):
                self._held.pop(index, None)
        return self.item(offset, length)

    def pieces(self, start: int, end: int, *, keep: bool) -> Iterator[memoryview]:
        """Writable views of shared memory that together are the bytes [start, end) of the object, in order.

        Args:
            start: First byte.
            end: One past the last byte.
            keep: Hold on to the parts for a second reading; otherwise that downloads them again.
        """
        while start < end:
            index = self._part_at(start)
            part = self._parts[index]
            stop = min(end, part.end)
            view = self._held.get(index)
            if view is None:
                view = self._read_ahead.take(self._first_fill + index)
            if keep or stop < part.end:
                self._held[index] = view
            else:
                self._held.pop(index, None)
            piece = view[start - part.start : stop - part.start]
            del view  # while the caller works, and after that, only the piece keeps the slot
            yield piece
            del piece
            start = stop

    # -- parts

    def _pieces_at_position(self, size: int) -> Iterator[memoryview]:
        if not size:
            return iter(())
        start = self._position
        self._check_covered(start, start + size)
        first = self._part_at(self._cluster_start(start))
        if first < self._lowest:
            raise ValueError(
                f"bytes {start}-{start + size} of {self._uri} were given back already: items must be read in the "
                f"order of their offsets. {FALLBACK_GUIDANCE}"
            )
        self._give_back_before(first)
        return self.pieces(start, start + size, keep=True)

    def _check_covered(self, start: int, end: int) -> None:
        index = bisect_right(self._covered_starts, start) - 1
        if index < 0 or end > self._covered[index].end:
            raise ValueError(
                f"bytes {start}-{end} of {self._uri} are not within the ranges of the load plan. {FALLBACK_GUIDANCE}"
            )

    def _cluster_start(self, position: int) -> int:
        return self._cluster_starts[bisect_right(self._cluster_starts, position) - 1]

    def _part_at(self, position: int) -> int:
        return bisect_right(self._part_starts, position) - 1

    def _give_back_before(self, index: int) -> None:
        if index > self._lowest:
            for held in [held for held in self._held if held < index]:
                del self._held[held]
            if self._read_ahead.transfer is not None:
                self._read_ahead.transfer.discard(self._first_fill + self._lowest, self._first_fill + index)
            self._lowest = index

    def _facts(self) -> str:
        return f" parts={len(self._parts)} held={len(self._held)}"


class ItemView:
    """The bytes of one item, wherever its parts lie.

    Attributes:
        size: Its number of bytes.
    """

    __slots__ = ("_keep", "_reader", "_start", "size")

    def __init__(self, reader: MultiprocessS3Reader, offset: int, length: int) -> None:
        self._reader = reader
        self._start = offset
        self.size = length
        # Nor does it hold much of a small arena, of which the host may not even have all.
        is_small = 8 * length <= reader.max_bytes
        self._keep = is_small and (
            length == 0 or reader._part_at(offset + length - 1) - reader._part_at(offset) < _MOST_PARTS_HELD
        )

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Writable views that together are the item's bytes [start, end), in order, without a copy.

        Args:
            start: First byte, counted from the start of the item.
            end: One past the last byte.

        Raises:
            PlanError: Not within the item.
        """
        self._check(start, end)
        return self._reader.pieces(self._start + start, self._start + end, keep=self._keep)

    def view(self, start: int, end: int) -> memoryview:
        """The item's bytes [start, end) in one piece: without a copy where they lie in one part.

        Raises:
            PlanError: Not within the item.
        """
        self._check(start, end)
        pieces = list(self._reader.pieces(self._start + start, self._start + end, keep=self._keep))
        return pieces[0] if len(pieces) == 1 else memoryview(bytearray().join(pieces))

    def _check(self, start: int, end: int) -> None:
        if not 0 <= start <= end <= self.size:
            raise PlanError(f"bytes {start}-{end} are not within an item of {self.size} bytes")
