"""Reader for DCP without worker processes: streams items that are known beforehand, in their order.

It is made by :class:`~mpreader.readers.constructor.DCPOptimizedConstructor`. It receives one item at a time, and must
not hold more than that item and two chunks. Items that are close together share a stream::

    stream  |..chunk..|..chunk..|..chunk..|     positions are those of the object
    items   [ a ][ b        ] gap [ c ]         a gap is received and skipped

An item is kept until the next one is read, as views of the chunks in which it was received: nothing is copied.
"""

from __future__ import annotations

import io
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from mpreader.errors import ShortRead
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, check_max_gap
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader, writable_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["FALLBACK_GUIDANCE", "DCPOptimizedS3Reader"]

FALLBACK_GUIDANCE: Final = (
    "For any other pattern of access give S3StorageReader a generic reader: "
    "reader_constructor=S3ReaderConstructor.default()"
)


class DCPOptimizedS3Reader(S3Reader):
    """Reads given items of an object, one after the other, and nothing else.

    Within the current item, bytes may be read in any order and repeatedly. A read of bytes in the next item makes that
    the current one, and drops the one before. An item that lies inside of the item before it counts as a part of that.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        item_ranges: The items in the order in which they will be read; may repeat and overlap. Empty items are skipped.
        get_object_info: Not used, because no size is needed. All kinds of readers are called with the same arguments.
        get_stream: Opens a stream of the object's bytes.
        max_gap_size: Largest gap, in bytes, between two items of one stream. 0: a new stream after every gap.

    Raises:
        TypeError: ``max_gap_size`` is not a number.
        ValueError: ``max_gap_size`` is negative; there are no ranges; ``bucket`` or ``key`` is empty.
        PlanError: A range is malformed.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
        max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        if not item_ranges:
            raise ValueError(f"item_ranges must name the items to read, got {item_ranges!r}. {FALLBACK_GUIDANCE}")
        check_max_gap(max_gap_size)
        self._items = _distinct(item_ranges)
        self._stream_ends = _stream_ends(self._items, max_gap_size)  # by item: end of a stream that begins with it
        self._next = 0  # index of the item after the current one
        self._item: _ItemBytes | None = None  # the current item
        self._stream: _ItemStream | None = None  # stream that the current item came from, which may bring the next one

    def read(self, size: int | None = None) -> bytes:
        """Read exactly ``size`` bytes of the current or the next item.

        Raises:
            TypeError: ``size`` is not a whole number.
            ValueError: ``size`` is None or negative; the bytes are not all in the current or all in the next item;
                the reader is closed.
            ShortRead: The stream ended before the item was complete.
        """
        self._check_open()
        if size is None or operator.index(size) < 0:
            raise ValueError(f"reading to the end of the object is not supported, got size {size}. {FALLBACK_GUIDANCE}")
        if size == 0:
            return b""
        data = b"".join(self._pieces(size))
        self._position += len(data)
        return data

    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Fill ``buf`` with bytes of the current or the next item.

        Raises:
            TypeError: ``buf`` is not a writable buffer.
            ValueError: The bytes are not all in the current or all in the next item; the reader is closed.
            ShortRead: The stream ended before the item was complete.
        """
        self._check_open()
        view = writable_view(buf)
        filled = 0
        for piece in self._pieces(len(view)) if view else ():
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        self._position += filled
        return filled

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position to any byte. Only the read checks if the byte lies in an item that can be read.

        Raises:
            TypeError: ``offset`` is not a whole number.
            ValueError: The new position is negative; ``whence`` is neither SEEK_SET nor SEEK_CUR;
                the reader is closed.
        """
        if whence not in (io.SEEK_SET, io.SEEK_CUR):  # SEEK_END would need a request for the object's size
            raise ValueError(f"whence must be SEEK_SET or SEEK_CUR, got {whence!r}. {FALLBACK_GUIDANCE}")
        self._position = self._seek_target(offset, whence)
        return self._position

    def close(self) -> None:
        """Drop the stream and the current item."""
        super().close()
        self._stream = None
        self._item = None

    def _pieces(self, size: int) -> Iterator[memoryview]:
        """Returns the next ``size`` bytes, in one or more pieces; they must lie in the current or in the next item."""
        start, end = self._position, self._position + size
        if self._item is None or not self._item.holds(start, end):
            self._item = self._load_next(start, end)
        return self._item.pieces(start, end)

    def _load_next(self, start: int, end: int) -> _ItemBytes:
        """Receive the next item, which must hold the bytes [start, end)."""
        if self._next == len(self._items) or not _holds(self._items[self._next], start, end):
            raise ValueError(self._out_of_order(start, end))
        item, stream_end = self._items[self._next], self._stream_ends[self._next]
        stream = self._stream
        if stream is None or not stream.reaches(item):
            chunks = iter(self._get_stream(item.start, stream_end))
            stream = _ItemStream(chunks, item.start, stream_end, self._short_read)
        # Both are dropped before the item is received. The old item would occupy memory beside the new one. A stream
        # that fails can't be used again: then _stream remains None, and reading the same item again opens a new one.
        self._item = self._stream = None
        loaded = stream.take(item)
        self._next += 1
        self._stream = stream
        return loaded

    def _out_of_order(self, start: int, end: int) -> str:
        """Text of the error for bytes that are neither in the current nor in the next item."""
        current = "none" if self._item is None else f"{self._item.start}-{self._item.end}"
        following = self._items[self._next : self._next + 1]
        next_one = f"{following[0].start}-{following[0].end}" if following else "none"
        return (
            f"bytes {start}-{end} of {self._uri} are neither in the current item ({current}) nor "
            f"in the next one ({next_one}); items can only be read in the order given. {FALLBACK_GUIDANCE}"
        )

    def _facts(self) -> str:
        return f" items={self._next}/{len(self._items)}"


class _ItemBytes:
    """Bytes of one item, as views of the chunks in which it was received.

    Args:
        start: First byte of the item in the object.
        segments: Its bytes, in order.
    """

    def __init__(self, start: int, segments: list[memoryview]) -> None:
        self.start = self.end = start
        self._segments = segments
        self._starts: list[int] = []  # first byte of each segment in the object
        for segment in segments:
            self._starts.append(self.end)
            self.end += len(segment)

    def holds(self, start: int, end: int) -> bool:
        """Returns True if the bytes [start, end) of the object lie in the item."""
        return self.start <= start and end <= self.end

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        """Yields the bytes [start, end) of the object, which the item must hold."""
        index = bisect_right(self._starts, start) - 1
        while start < end:
            skip = start - self._starts[index]
            piece = self._segments[index][skip : skip + end - start]
            yield piece
            start += len(piece)
            index += 1


class _ItemStream:
    """Stream of the bytes [position, end) of the object, from which items are taken in ascending order.

    Args:
        chunks: The bytes, as they are received.
        position: First byte of the stream in the object.
        end: One past the last byte of the stream in the object.
        short_read: Makes the error of a stream that ends early, from its start, its end, and the bytes received.
    """

    def __init__(
        self, chunks: Iterator[bytes], position: int, end: int, short_read: Callable[[int, int, int], ShortRead]
    ) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")  # those bytes of the last chunk that were not taken yet
        self._start = position  # for the error of a short read only
        self._position = position  # first byte that was not taken yet
        self._end = end
        self._short_read = short_read

    def reaches(self, item: ItemRange) -> bool:
        """Returns True if the item lies within the bytes that were not taken yet."""
        return self._position <= item.start and item.end <= self._end

    def take(self, item: ItemRange) -> _ItemBytes:
        """Skip to the item and receive it."""
        while self._position < item.start:
            self._advance(item.start)  # bytes of a gap
        segments = []
        while self._position < item.end:
            segments.append(self._advance(item.end))
        return _ItemBytes(item.start, segments)

    def _advance(self, limit: int) -> memoryview:
        """Take the next bytes before ``limit``: the rest of the current chunk or, without a rest, the next chunk."""
        while not self._rest:  # a loop, because a stream may send empty chunks
            chunk = next(self._chunks, None)
            if chunk is None:
                raise self._short_read(self._start, self._end, self._position - self._start)
            self._rest = memoryview(chunk)
        size = limit - self._position
        piece, self._rest = self._rest[:size], self._rest[size:]
        self._position += len(piece)
        return piece


def _distinct(item_ranges: Sequence[ItemRange]) -> list[ItemRange]:
    """Returns the items that are streamed: all but empty ones and those inside of the item streamed before them."""
    items: list[ItemRange] = []
    for given in item_ranges:
        item = ItemRange(given.start, given.end)  # s3torchconnector's class of the same name has no checks
        if item.size and not (items and _holds(items[-1], item.start, item.end)):
            items.append(item)
    return items


def _stream_ends(items: Sequence[ItemRange], max_gap: float) -> list[int]:
    """Returns, for each item, the end of a stream that begins with it.

    A stream continues to the last of the items that follow each other with gaps of at most ``max_gap``.
    """
    ends = [item.end for item in items]
    # From the last item to the first: the end for an item is that of its successor, if it is near.
    for index in reversed(range(len(items) - 1)):
        if 0 <= items[index + 1].start - items[index].end <= max_gap:
            ends[index] = ends[index + 1]
    return ends


def _holds(item: ItemRange, start: int, end: int) -> bool:
    return item.start <= start and end <= item.end
