"""Reader for sparse reads: makes a ranged request for each large read, and serves small reads from a buffer."""

from __future__ import annotations

import io
import operator
from typing import TYPE_CHECKING, Any, Final

from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader, writable_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["DEFAULT_BUFFER_SIZE", "RangedS3Reader", "check_buffer_size"]

DEFAULT_BUFFER_SIZE: Final = 8 * 1024 * 1024


def check_buffer_size(value: object) -> None:
    """Check the public argument ``buffer_size``.

    Raises:
        TypeError: ``value`` is neither None nor a whole number.
        ValueError: ``value`` is negative.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):  # True and False are ints to Python
        raise TypeError(f"buffer_size must be int or None, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"buffer_size must be non-negative, got {value}")


class RangedS3Reader(S3Reader):
    """Requests the bytes that are read, and little more.

    A read of less than ``buffer_size`` bytes requests ``buffer_size`` bytes, and keeps them for the reads that follow.
    A larger read is received straight into the caller's memory. Bytes that the buffer holds are not requested again.
    The reader can be pickled if ``get_object_info`` and ``get_stream`` can; the copy begins with an empty buffer.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        get_object_info: Asks for the object's size.
        get_stream: Opens a stream of the object's bytes.
        buffer_size: Bytes of the buffer. None: 8 MiB; 0: no buffer.

    Raises:
        TypeError: ``buffer_size`` is not a whole number.
        ValueError: ``buffer_size`` is negative; ``bucket`` or ``key`` is empty.
    """

    def __init__(
        self,
        bucket: str,
        key: str,
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
        buffer_size: int | None = None,
    ) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        check_buffer_size(buffer_size)
        self._buffer_size = DEFAULT_BUFFER_SIZE if buffer_size is None else buffer_size
        self._buffer_start = 0
        self._drop_buffer()

    def read(self, size: int | None = None) -> bytes:
        """Read from the position onwards; see :meth:`S3Reader.read`."""
        self._check_open()
        wanted = -1 if size is None else operator.index(size)
        # seek() keeps the position within the object, so that this is never negative.
        left = self._object_size() - self._position
        data = bytearray(left if wanted < 0 else min(wanted, left))
        self._fill(memoryview(data))
        return bytes(data)

    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Read from the position onwards into ``buf``; see :meth:`S3Reader.readinto`."""
        self._check_open()
        view = writable_view(buf)[: self._object_size() - self._position]
        self._fill(view)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position. Requests no bytes, but may ask for the object's size; see :meth:`S3Reader.seek`."""
        self._position = min(self._seek_target(offset, whence), self._object_size())
        return self._position

    def close(self) -> None:
        """Drop the buffer."""
        super().close()
        self._drop_buffer()

    def _drop_buffer(self) -> None:
        self._memory = bytearray()
        # The valid bytes of _memory. The first of them is the byte _buffer_start of the object.
        self._buffer = memoryview(b"")

    def __getstate__(self) -> dict[str, Any]:
        # A memoryview can't be pickled.
        return {name: value for name, value in self.__dict__.items() if name not in ("_memory", "_buffer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._drop_buffer()

    def _fill(self, view: memoryview) -> None:
        """Fill all of ``view`` with the bytes from the position onwards, and move the position behind them."""
        position = self._position  # set at the end only, so that a read can be repeated after an error
        taken = self._copy_from_buffer(view, position)
        if taken < len(view):
            view = view[taken:]
            position += taken
            if len(view) >= self._buffer_size:
                self._fetch(view, position)
                taken = len(view)
            else:
                self._load_buffer(position)
                taken = self._copy_from_buffer(view, position)
        self._position = position + taken

    def _copy_from_buffer(self, view: memoryview, position: int) -> int:
        """Copy the bytes from ``position`` onwards that the buffer holds; returns their number."""
        skip = position - self._buffer_start
        if skip < 0:
            return 0
        found = self._buffer[skip : skip + len(view)]
        view[: len(found)] = found
        return len(found)

    def _load_buffer(self, position: int) -> None:
        """Fill the buffer with the bytes from ``position`` onwards."""
        size = min(self._buffer_size, self._object_size() - position)
        # The memory is used again for the next request: fresh memory would cost more time than receiving into it.
        if len(self._memory) < size:
            self._memory = bytearray(size)
        # Empty until all bytes are there: after a request that failed, old and new bytes are mixed in the memory.
        self._buffer = memoryview(b"")
        fresh = memoryview(self._memory)[:size]
        self._fetch(fresh, position)
        self._buffer, self._buffer_start = fresh, position

    def _fetch(self, view: memoryview, position: int) -> None:
        """Fill all of ``view`` with the bytes from ``position`` onwards, by one request."""
        filled, end = 0, position + len(view)
        for chunk in self._get_stream(position, end):
            # A stream that sends more than was requested must not write past the end of the view.
            piece = memoryview(chunk)[: len(view) - filled]
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == len(view):
                return
        raise self._short_read(position, end, filled)

    def _facts(self) -> str:
        return f" buffered={len(self._buffer)}"
