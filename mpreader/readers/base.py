"""Base class of the readers: a read-only file over one object, with a position and a state.

All kinds of readers derive from it; they differ in how they get the bytes. A reader makes no requests itself: it is
given two functions, :class:`GetObjectInfo` and :class:`GetStream`, and knows neither clients nor credentials.
"""

from __future__ import annotations

import io
import operator
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from mpreader.errors import ShortRead

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["GetObjectInfo", "GetStream", "ObjectInfo", "S3Reader", "writable_view"]


class ObjectInfo(Protocol):
    """Facts that a HEAD request tells of an object."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""


class GetObjectInfo(Protocol):
    """Asks for the object's size; a reader calls it once at most."""

    def __call__(self) -> ObjectInfo:
        """Ask."""


class GetStream(Protocol):
    """Opens a stream of the object's bytes."""

    def __call__(self, start: int | None = None, end: int | None = None) -> Iterator[bytes]:
        """Open a stream.

        Args:
            start: First byte of the object to send. None: 0.
            end: One past the last byte to send. None: the object's size.
        """


def writable_view(buffer: WriteableBuffer) -> memoryview:
    """View ``buffer`` as writable bytes.

    Raises:
        TypeError: ``buffer`` is read-only, not contiguous, or no buffer at all.
    """
    view = memoryview(buffer)
    if view.readonly:
        raise TypeError(f"a writable bytes-like object is required, not {type(buffer).__name__}")
    # A view without bytes can't be cast, whatever its format is.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


class S3Reader(io.BufferedIOBase):
    """Read-only file over one object of S3.

    Not thread-safe. After ``close()`` everything that reads or moves raises ``ValueError``.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        get_object_info: Asks for the object's size; called once at most, when the size is needed.
        get_stream: Opens a stream of the object's bytes.

    Raises:
        ValueError: ``bucket`` or ``key`` is empty.
    """

    def __init__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> None:
        if not bucket:
            raise ValueError("bucket must not be empty")
        if not key:
            raise ValueError("key must not be empty")
        self._bucket = bucket
        self._key = key
        self._get_object_info = get_object_info
        self._get_stream = get_stream
        self._size: int | None = None
        self._position = 0

    @property
    def bucket(self) -> str:
        """The object's bucket."""
        return self._bucket

    @property
    def key(self) -> str:
        """The object's key."""
        return self._key

    @abstractmethod
    def read(self, size: int | None = None) -> bytes:
        """Read from the position onwards.

        Args:
            size: Most bytes to read. None or negative: up to the end of the object.

        Returns:
            The bytes; fewer than ``size`` only at the end of the object.

        Raises:
            TypeError: ``size`` is not a whole number.
            ValueError: The reader is closed.
            ShortRead: The stream ended before the bytes were there.
        """

    def read1(self, size: int | None = None, /) -> bytes:
        """Same as :meth:`read`; text wrappers call it."""
        return self.read(size)

    @abstractmethod
    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Read from the position onwards into ``buf``.

        Returns:
            Number of bytes read; fewer than ``buf`` holds only at the end of the object.

        Raises:
            TypeError: ``buf`` is not a writable buffer.
            ValueError: The reader is closed.
            ShortRead: The stream ended before the bytes were there.
        """

    @abstractmethod
    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; past the end of the object it stays at the end.

        Args:
            offset: Bytes, relative to ``whence``.
            whence: ``io.SEEK_SET``, ``io.SEEK_CUR`` or ``io.SEEK_END``.

        Returns:
            The new position.

        Raises:
            TypeError: An argument is not a whole number.
            ValueError: The new position is negative, ``whence`` is unknown, or the reader is closed;
                the position is what it was.
        """

    def tell(self) -> int:
        """Returns the position: the object's byte that is read next."""
        self._check_open()
        return self._position

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def readable(self) -> bool:
        """Returns True."""
        return True

    def writable(self) -> bool:
        """Returns False."""
        return False

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return (
            f"<{type(self).__name__} s3://{self._bucket}/{self._key} {state} position={self._position}{self._facts()}>"
        )

    def _facts(self) -> str:
        """Returns counts of the kind of reader, for the repr."""
        return ""

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed reader of s3://{self._bucket}/{self._key}")

    def _object_size(self) -> int:
        if self._size is None:
            self._size = self._get_object_info().size
        return self._size

    def _seek_target(self, offset: int, whence: int) -> int:
        """Returns the position that a seek leads to, not yet bounded by the object's end."""
        self._check_open()
        # Everything is checked before the caller sets the position: a seek that fails must not move it.
        target, whence = operator.index(offset), operator.index(whence)
        if whence == io.SEEK_CUR:
            target += self._position
        elif whence == io.SEEK_END:
            target += self._object_size()
        elif whence != io.SEEK_SET:
            raise ValueError(f"whence must be SEEK_SET, SEEK_CUR or SEEK_END, got {whence}")
        if target < 0:
            raise ValueError(f"can't seek to the negative position {target}")
        return target

    def _short_read(self, start: int, end: int, received: int) -> ShortRead:
        return ShortRead(
            f"the stream of bytes {start}-{end} of s3://{self._bucket}/{self._key} ended after {received} of "
            f"{end - start} bytes",
            bucket=self._bucket,
            key=self._key,
            range=(start, end),
            attempts=1,
        )
