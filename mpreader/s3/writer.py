"""S3Writer: a write-only file that becomes an object when it is closed.

Made by ``S3Client.put_object``. It owns the buffer and the threads of an upload, and decides when to give it up; the
requests themselves are made by :mod:`mpreader.s3.upload`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TYPE_CHECKING, Final

from mpreader.errors import MpreaderError, ObjectMissing
from mpreader.s3.requester import Requester
from mpreader.s3.upload import MultipartUpload, next_part_bytes, put_whole

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from typing_extensions import Self

__all__ = ["S3Writer"]

_THREADS: Final = 2  # each holds a part, and the writer a third one: this bounds the memory of a writer
_log = logging.getLogger(__name__)


class S3Writer(io.BufferedIOBase):
    """Write-only file that becomes one object; parts are sent while the next ones are written. Not thread-safe.

    ``close()`` makes the object, whole or not at all: after an error, after an exception within the ``with`` block, or
    if the writer is dropped without being closed, neither an object nor parts are left. It takes the memory of three
    parts of ``S3ClientConfig.part_size``; beyond 1,250 parts the parts grow.

    Args:
        client: Client that makes the requests.
        bucket: The object's bucket.
        key: The object's key.
        storage_class: S3's name of the storage class, such as ``"STANDARD_IA"``. None: the service's default.
    """

    def __init__(self, client: Requester, bucket: str, key: str, storage_class: str | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._storage_class = storage_class
        self._pid = os.getpid()
        self._lock = threading.Lock()  # of close(): two threads that close must not both make the object
        self._position = 0  # bytes written so far
        self._part_bytes = client.s3client_config.part_size  # size of the part that is being filled
        self._buffer = bytearray()  # that part; at most _part_bytes long
        self._parts = 0  # number of parts that were given to the threads
        self._sent = 0  # bytes in these parts
        self._pending: set[Future[None]] = set()  # parts that are being sent, at most _THREADS
        # Both None until a first part is full: a smaller object is made by one request.
        self._upload: MultipartUpload | None = None
        self._threads: ThreadPoolExecutor | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write any buffer of bytes. The bytes are copied, so the caller may change the buffer afterwards.

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
            # Also after a Ctrl-C: some bytes may be missing from the middle of the object, which must not be made then.
            self._give_up()
            raise
        self._position += view.nbytes
        return view.nbytes

    def close(self) -> None:
        """Send the rest of the bytes and make the object. A second call does nothing.

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
        """Return the number of bytes written so far."""
        return self._position

    def readable(self) -> bool:
        """Return False."""
        return False

    def writable(self) -> bool:
        """Return True while the writer is open."""
        return not self.closed

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The base class would call close() also after an exception, and so make an object that is only half written.
        if kind is None:
            self.close()
        elif not self.closed:
            self._give_up()

    def __del__(self) -> None:
        # The base class would call close(), and so make an object that the program never finished. Errors can reach
        # nobody from here; they occur if __init__ has failed, or while the interpreter shuts down.
        with contextlib.suppress(Exception):
            # The copy in a forked child must not abort the upload, which goes on in the parent.
            if not self.closed and os.getpid() == self._pid:
                self._give_up()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<S3Writer s3://{self._bucket}/{self._key} {state} position={self._position} parts={self._parts}>"

    def __enter__(self) -> Self:
        return self

    def _make_room(self) -> None:
        """Send the buffer if it is full.

        Called only when more bytes follow, so an object of exactly one part is still made by one request.
        """
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
        # The executor would queue any number of parts. Waiting here keeps the writer to three parts in memory.
        if len(self._pending) == _THREADS:
            self._collect(FIRST_COMPLETED)
        self._parts += 1
        self._sent += len(self._buffer)
        # Not a method of the writer: the threads would hold a reference to it, and a dropped writer would stay alive.
        self._pending.add(self._threads.submit(self._upload.send, self._parts, self._buffer))
        self._buffer = bytearray()  # a new one, not cleared: the thread sends the old one

    def _collect(self, when: str) -> None:
        """Wait for parts that are being sent, and raise the error of one that failed.

        Args:
            when: ``FIRST_COMPLETED`` or ``ALL_COMPLETED`` of :mod:`concurrent.futures`.
        """
        done, self._pending = wait(self._pending, return_when=when)
        for part in done:
            part.result()

    def _finish(self) -> None:
        if self._upload is None:
            put_whole(self._client, self._bucket, self._key, self._buffer, self._storage_class)
            return
        self._send_part()
        self._collect(ALL_COMPLETED)
        self._upload.complete()

    def _give_up(self) -> None:
        """Close without making an object, and delete the parts that were sent."""
        self._release()
        if self._upload is None:
            return
        try:
            self._upload.abort()
        except ObjectMissing:
            pass  # something else aborted the upload, which deleted its parts
        except MpreaderError as error:
            # Logged and not raised: raising it would hide the error for which the writer gives up.
            _log.warning("parts of s3://%s/%s stay behind, and cost money: %s", self._bucket, self._key, error)

    def _release(self) -> None:
        """Mark the file as closed, and end buffer and threads."""
        super().close()
        self._buffer = bytearray()  # gives the memory back even if the writer is kept
        if self._threads is not None:
            # Waits for parts under way: a part that arrives after the abort would stay in S3, and cost money.
            self._threads.shutdown(wait=True, cancel_futures=True)


def _as_bytes(view: memoryview) -> memoryview:
    try:
        return view.cast("B")
    except TypeError:  # not contiguous, or of a format that memoryview doesn't know
        return memoryview(view.tobytes())
