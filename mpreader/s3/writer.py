"""S3Writer: a write-only file that becomes an object when it is closed.

Made by ``S3Client.put_object``. Requests are made by :mod:`mpreader.s3.upload`; here are the buffer and the threads.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Final

from mpreader.errors import MpreaderError, ObjectMissing
from mpreader.s3.requester import Requester
from mpreader.s3.upload import MultipartUpload, next_part_bytes, put_whole

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from typing_extensions import Self

__all__ = ["S3Writer"]

_THREADS: Final = 2  # each holds a part, and the writer a third one
_log = logging.getLogger(__name__)


class S3Writer(io.BufferedIOBase):
    """Writes one object, in parts that are sent while the next ones are written. Not thread-safe.

    The object is made by ``close()``, all of it or nothing: an error, an exception within the ``with`` block, or
    dropping the writer without closing it leave no object and no parts. Memory: three parts of
    ``S3ClientConfig.part_size``; beyond 1,250 parts they grow.

    Args:
        client: Client that makes the requests.
        bucket: The object's bucket.
        key: The object's key.
        storage_class: Such as ``"STANDARD_IA"``. None: the service's default.
    """

    def __init__(self, client: Requester, bucket: str, key: str, storage_class: str | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._storage_class = storage_class
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of close(): two threads that close must not both make the object
        self._position = 0
        self._part_bytes = client.s3client_config.part_size
        self._buffer = bytearray()
        self._parts = 0
        self._sent = 0
        self._pending: set[Future[None]] = set()
        self._upload: MultipartUpload | None = None
        self._threads: ThreadPoolExecutor | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write any buffer of bytes; it may be changed afterwards.

        Returns:
            Number of bytes written: all of them.

        Raises:
            ValueError: The writer is closed, or an earlier write failed.
            TransportError: S3 refused, or could not be reached; there will be no object.
        """
        if self.closed:
            raise ValueError(f"write to closed writer of s3://{self._bucket}/{self._key}")
        view = memoryview(data)
        if not view.nbytes:
            return 0
        rest = _as_bytes(view)
        try:
            while rest:
                self._make_room()
                count = min(len(rest), self._part_bytes - len(self._buffer))
                self._buffer += rest[:count]
                rest = rest[count:]
        except BaseException:
            self._give_up()
            raise
        self._position += view.nbytes
        return view.nbytes

    def close(self) -> None:
        """Send what is left and make the object. Again is harmless.

        Raises:
            TransportError: S3 refused, or could not be reached; there is no object.
        """
        with self._lock:
            if self.closed:
                return
            try:
                self._finish()
            except BaseException:
                self._give_up()
                raise
            self._release()

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self._position

    def readable(self) -> bool:
        """False."""
        return False

    def writable(self) -> bool:
        """Return True while the writer is open."""
        return not self.closed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The base class would close it whatever happened, and so make an object of what is only half written.
        if kind is None:
            self.close()
        elif not self.closed:
            self._give_up()

    def __del__(self) -> None:
        # As in __exit__: not close(), as the base class does.
        with contextlib.suppress(Exception):
            # A forked child's copy must not abort the upload that goes on in the parent.
            if not self.closed and os.getpid() == self._pid:
                self._give_up()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<S3Writer s3://{self._bucket}/{self._key} {state} position={self._position} parts={self._parts}>"

    def __enter__(self) -> Self:
        return self

    def _make_room(self) -> None:
        """Send the buffer if it is full; called only when more is to come: a single part needs no multipart upload."""
        if len(self._buffer) < self._part_bytes:
            return
        if self._upload is None:
            self._upload = MultipartUpload(self._client, self._bucket, self._key, self._storage_class)
            self._threads = ThreadPoolExecutor(_THREADS, "mpreader-upload")
        self._send_part()
        self._part_bytes = next_part_bytes(self._part_bytes, self._sent)

    def _send_part(self) -> None:
        assert self._upload is not None  # for the type checker
        assert self._threads is not None
        if len(self._pending) == _THREADS:
            self._collect(FIRST_COMPLETED)
        self._parts += 1
        self._sent += len(self._buffer)
        # Not a method of this object: the threads must not keep it alive when it is dropped.
        self._pending.add(self._threads.submit(self._upload.send, self._parts, self._buffer))
        self._buffer = bytearray()

    def _collect(self, when: str) -> None:
        """Wait for parts that are being sent, and raise the error of one that failed."""
        done, self._pending = wait(self._pending, return_when=when)
        for part in done:
            part.result()

    def _finish(self) -> None:
        if self._upload is None:
            put_whole(self._client, self._bucket, self._key, self._buffer, self._storage_class)
            return
        self._send_part()
        self._collect("ALL_COMPLETED")
        self._upload.complete()

    def _give_up(self) -> None:
        """Close without making an object, and delete the parts that were sent."""
        self._release()
        if self._upload is None:
            return
        try:
            self._upload.abort()
        except ObjectMissing:
            pass  # it is gone, and its parts with it
        except MpreaderError as error:
            # Raising it would hide why this is given up.
            _log.warning("parts of s3://%s/%s stay behind, and cost money: %s", self._bucket, self._key, error)

    def _release(self) -> None:
        super().close()
        self._buffer = bytearray()
        if self._threads is not None:
            # A part that arrives after the abort would stay behind.
            self._threads.shutdown(wait=True, cancel_futures=True)


def _as_bytes(view: memoryview) -> memoryview:
    try:
        return view.cast("B")
    except TypeError:  # not contiguous, or of a format that memoryview doesn't know
        return memoryview(view.tobytes())
