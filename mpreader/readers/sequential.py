"""Reader for any pattern of access: receives the object once, from its start, and keeps what it has received.

It is the default of the storage readers where no other kind is chosen, and reads ``.metadata`` for all of them.
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
    """Reads an object as one stream and keeps its bytes, so that seeking back costs nothing.

    Memory grows to the furthest byte that was read or sought. The object's size is only asked for when a seek is
    relative to the end: else the end of the stream is the end of the object.
    """

    def __init__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> None:
        super().__init__(bucket, key, get_object_info, get_stream)
        self._stream: Iterator[bytes] | None = None
        self._buffer = io.BytesIO()
        self._received = 0
        self._broken = False  # True once the stream has failed

    def prefetch(self) -> None:
        """Open the stream now, so that the first bytes are on their way before they are read."""
        self._check_open()
        self._open_stream()

    def read(self, size: int | None = None) -> bytes:
        """Read from the position onwards; see :meth:`S3Reader.read`."""
        self._check_open()
        wanted = -1 if size is None else operator.index(size)
        if self._position == self._size:  # where a seek from the end may have led, before there is a stream
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
        """Move the position; forward of what was received, this receives up to there. See :meth:`S3Reader.seek`."""
        target = self._seek_target(offset, whence)
        if self._size is None:  # it takes the bytes up to there to know if the object is so long
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
        """Receive up to byte ``end`` (None: everything), or up to the object's end where that comes first."""
        self._buffer.seek(self._received)
        while end is None or self._received < end:
            chunk = self._next_chunk()
            if chunk is None:
                return
            self._received += self._buffer.write(chunk)

    def _next_chunk(self) -> bytes | None:
        if self._broken:
            # A generator that has failed looks exhausted when asked again: the object would seem to end there.
            raise TransportError(
                f"an earlier read of s3://{self._bucket}/{self._key} failed; open a new reader",
                bucket=self._bucket,
                key=self._key,
            )
        stream = self._open_stream()
        self._broken = True  # until the chunk is there: whatever is raised until then, Ctrl-C too, breaks the stream
        chunk = next(stream, None)
        if chunk is None:
            self._check_complete()
        self._broken = False
        return chunk

    def _check_complete(self) -> None:
        """Compare the bytes of a stream that has ended with the object's size, if a seek has asked for that."""
        if self._size is None:
            self._size = self._received
        if self._received < self._size:
            raise self._short_read(0, self._size, self._received)
        if self._received > self._size:
            raise ObjectChanged(
                f"s3://{self._bucket}/{self._key} was said to hold {self._size} bytes, but {self._received} came",
                bucket=self._bucket,
                key=self._key,
                range=(0, self._size),
                attempts=1,
            )

    def _facts(self) -> str:
        return f" received={self._received}"
