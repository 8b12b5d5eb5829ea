"""Base class of the readers: a read-only file over one object, with a position.

All kinds of readers derive from it, and differ in the way in which they get the bytes. A reader must not use a client
or credentials: it is given two functions that make the requests, :class:`GetObjectInfo` and :class:`GetStream`.
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
    """Facts about an object, from a HEAD request or a listing."""

    @property
    def size(self) -> int:
        """Number of bytes of the whole object."""


class GetObjectInfo(Protocol):
    """Function that asks for the object's size. A reader calls it at most once."""

    def __call__(self) -> ObjectInfo:
        """Make the request."""


class GetStream(Protocol):
    """Function that opens a stream of the object's bytes."""

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
    # memoryview.cast() refuses some views without bytes, such as those with several dimensions.
    return view.cast("B") if view.nbytes else memoryview(bytearray())


class S3Reader(io.BufferedIOBase):
    """Read-only file over one object of S3.

    Not thread-safe. After ``close()``, all methods that read or that move the position raise ``ValueError``.

    Args:
        bucket: The object's bucket.
        key: The object's key.
        get_object_info: Asks for the object's size; called at most once, when the size is first needed.
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
        self._uri = f"s3://{bucket}/{key}"
        self._get_object_info = get_object_info
        self._get_stream = get_stream
        self._size: int | None = None  # of the object; None until it is known
        self._position = 0  # first byte of the object that is read next

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
            size: Largest number of bytes to read. None or negative: up to the end of the object.

        Returns:
            The bytes; fewer than ``size`` only at the end of the object.

        Raises:
            TypeError: ``size`` is not a whole number.
            ValueError: The reader is closed.
            ShortRead: The stream ended before the bytes were there.
        """

    def read1(self, size: int | None = None, /) -> bytes:
        """Same as :meth:`read`; ``io.TextIOWrapper`` calls it."""
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
        """Move the position. A position past the end of the object becomes its end.

        Args:
            offset: Bytes, relative to ``whence``.
            whence: ``io.SEEK_SET``, ``io.SEEK_CUR`` or ``io.SEEK_END``.

        Returns:
            The new position.

        Raises:
            TypeError: An argument is not a whole number.
            ValueError: The new position is negative, ``whence`` is unknown, or the reader is closed. The position
                stays unchanged.
        """

    def tell(self) -> int:
        """Returns the position: offset, in the object, of the byte that is read next."""
        if self.closed:
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
        return f"<{type(self).__name__} {self._uri} {state} position={self._position}{self._facts()}>"

    def _facts(self) -> str:
        """Returns further state for the repr, as a text that begins with a space."""
        return ""

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"I/O operation on closed reader of {self._uri}")

    def _object_size(self) -> int:
        if self._size is None:
            self._size = self._get_object_info().size
        return self._size

    def _seek_target(self, offset: int, whence: int) -> int:
        """Check the arguments of a seek and return the new position, which may be past the end of the object."""
        self._check_open()
        # Everything is checked before the caller sets the position, because a seek that fails must not move it.
        # operator.index() accepts whole numbers of any type, such as numpy's, and refuses floats.
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
            f"the stream of bytes {start}-{end} of {self._uri} ended after {received} of {end - start} bytes",
            bucket=self._bucket,
            key=self._key,
            range=(start, end),
            attempts=1,
        )
