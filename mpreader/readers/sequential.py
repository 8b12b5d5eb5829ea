"""Reader for any pattern of access: receives the object once, from its start, and keeps the bytes that it received.

It is the default kind of reader, and reads ``.metadata`` for the constructors that are given a load plan.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpreader.errors import ObjectChanged, TransportError
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader, writable_view

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["SequentialS3Reader"]


class SequentialS3Reader(S3Reader):
    """Reads an object as one stream and keeps its bytes, so that seeking back needs no request.

    Memory grows up to the furthest byte that was read, or that a seek has moved to. The object's size is asked for only
    by a seek relative to the end; otherwise the end of the stream is the end of the object.
    """

    def __init__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._stream: Iterator[bytes] | None = None  # opened by the first read
        self._buffer = io.BytesIO()  # the first _received bytes of the object
        self._received = 0
        self._broken = False  # True once the stream has failed

    def prefetch(self) -> None:
        """Open the stream now, so that the first bytes are being sent before they are read."""
        self._check_open()
        self._open_stream()

    def read(self, size: int | None = None) -> bytes:
        """Read from the position onwards; see :meth:`S3Reader.read`."""
        self._check_open()
        wanted = -1 if size is None else operator.index(size)
        if self._position == self._size:  # a seek to the end, and nothing to read: no stream need be opened
            return b""
        self._receive(self._position + wanted if wanted >= 0 else None)
        self._buffer.seek(self._position)
        data = self._buffer.read(wanted)
        self._position += len(data)
        return data

    def readinto(self, buf: WriteableBuffer, /) -> int:
        """Read from the position onwards into ``buf``; see :meth:`S3Reader.readinto`."""
        self._check_open()
        view = writable_view(buf)
        if self._position == self._size:
            return 0
        self._receive(self._position + len(view))
        self._buffer.seek(self._position)
        count = self._buffer.readinto(view)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; receives the bytes up to there if the size is not known. See :meth:`S3Reader.seek`."""
        target = self._seek_target(offset, whence)
        # The position must not lie past the end of the object. Receiving the bytes up to it shows if it does, and takes
        # no further request for the size.
        if self._size is None:
            self._receive(target)
        self._position = target if self._size is None else min(target, self._size)
        return self._position

    def close(self) -> None:
        """Drop the stream and the bytes."""
        super().close()
        self._stream = None
        self._buffer = io.BytesIO()

    def _open_stream(self) -> Iterator[bytes]:
        if self._stream is None:
            self._stream = iter(self._get_stream())
        return self._stream

    def _receive(self, end: int | None) -> None:
        """Receive the bytes before ``end`` (None: all bytes), or up to the end of the object if that comes first."""
        self._buffer.seek(self._received)
        while end is None or self._received < end:
            chunk = self._next_chunk()
            if chunk is None:
                return
            self._received += self._buffer.write(chunk)

    def _next_chunk(self) -> bytes | None:
        """Returns the next chunk of the stream; None at the end of the object."""
        if self._broken:
            # A generator that has raised an error is exhausted from then on: the object would seem to end there.
            raise TransportError(
                f"an earlier read of {self._uri} failed; open a new reader",
                bucket=self._bucket,
                key=self._key,
            )
        stream = self._open_stream()
        # Set before the chunk is received and reset afterwards, so that any exception in between breaks the stream,
        # a KeyboardInterrupt included. Opening the stream is not included: it may be tried again.
        self._broken = True
        chunk = next(stream, None)
        if chunk is None:
            self._check_complete()
        self._broken = False
        return chunk

    def _check_complete(self) -> None:
        """Compare the number of bytes received with the size that a seek has asked for; set the size if none has."""
        if self._size is None:
            self._size = self._received
        if self._received < self._size:
            raise self._short_read(0, self._size, self._received)
        if self._received > self._size:
            raise ObjectChanged(
                f"{self._uri} was said to hold {self._size} bytes, but {self._received} came",
                bucket=self._bucket,
                key=self._key,
                range=(0, self._size),
                attempts=1,
            )

    def _facts(self) -> str:
        return f" received={self._received}"
