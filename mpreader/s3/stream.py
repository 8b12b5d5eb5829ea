"""PinnedObject: streams of an object's bytes, all of one version, for the readers that read in the caller's process.

Made by :class:`mpreader.readers.client.S3Client`. boto3 retries a request until its response begins; this module
resumes a body that breaks. It must not hand out a byte of a response before the response has passed the check of
:mod:`mpreader.pool.worker.partial_content`. The worker processes do the same for the pool, without boto3.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from typing import Any, Final

import urllib3
from botocore.exceptions import BotoCoreError

from mpreader.config import MiB
from mpreader.errors import MpreaderError, ObjectChanged, PlanError, ShortRead, TransportError
from mpreader.pool.worker.partial_content import Mismatch, PartialContent, find_mismatch, parse_content_range
from mpreader.s3.objects import HasSize
from mpreader.s3.requester import Requester

__all__ = ["PinnedObject"]

_CHUNK_BYTES: Final = 1 * MiB  # most bytes of one receive, and so the memory that a stream takes
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0


class _Broken(Exception):
    """Response that can't be used, though the next attempt may bring a right one."""


# All errors of a broken body: botocore, urllib3 or the socket raises one, depending on where the body breaks.
_BREAKS: Final = (_Broken, BotoCoreError, urllib3.exceptions.HTTPError, OSError)


class PinnedObject:
    """Object in one version: the version that the first response names, or ``object_info``. Picklable; not thread-safe.

    Args:
        client: Client that makes the requests.
        bucket: The object's bucket.
        key: The object's key.
        object_info: Facts of the object, if they are known already. If they have an ``etag``, only that version is
            read.
    """

    def __init__(self, client: Requester, bucket: str, key: str, object_info: HasSize | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._info = object_info
        # "" until the version is decided. getattr, since object_info need not have more than a size.
        self._etag: str = getattr(object_info, "etag", None) or ""

    def __repr__(self) -> str:
        return f"<PinnedObject s3://{self._bucket}/{self._key} {self._etag}>"

    def info(self) -> HasSize:
        """Return the object's size and version; makes one HEAD request, the first time.

        Raises:
            ObjectChanged: A stream has seen another version.
            TransportError: As for :meth:`mpreader.s3.client.BaseS3Client.head_object`.
        """
        if self._info is None:
            info = self._client.head_object(self._bucket, self._key)
            if self._etag and info.etag != self._etag:
                error = self._other_version(info.etag)
                if isinstance(error, _Broken):  # which only a stream knows to repeat
                    raise TransportError(f"{self._uri()}: {error}", bucket=self._bucket, key=self._key, attempts=1)
                raise error
            self._etag, self._info = info.etag, info
        return self._info

    def stream(self, start: int | None = None, end: int | None = None) -> Iterator[bytes]:
        """Make the request at once, and return its bytes as they arrive. A body that breaks is resumed.

        Args:
            start: First byte of the object to read. None: 0.
            end: One past the last byte to read. None: the object's size.

        Returns:
            Chunks of at most 1 MiB; together they are exactly the range. A chunk may be empty. Iterating raises the
            same errors.

        Raises:
            PlanError: The range ends past the end of the object.
            ObjectChanged: The object was overwritten since its first bytes were read.
            ShortRead: ``max_attempts`` attempts in a row brought no byte.
            TransportError: The service refused, or could not be reached.
        """
        chunks = self._chunks(start or 0, end)
        # A generator runs only when it is asked for a value. Taking its first, empty chunk makes the request now, and
        # raises the request's error here. None: a range without bytes needs no request.
        next(chunks, None)
        return chunks

    def _chunks(self, position: int, end: int | None) -> Iterator[bytes]:
        """Yield an empty chunk once the first request has gone out, then bytes [position, end)."""
        failures = 0  # attempts in a row that brought no byte
        while end is None or position < end:
            reached = position  # to see, after a failure, whether this attempt has brought bytes
            try:
                body, end = self._open(position, end)
                with contextlib.closing(body):
                    yield b""
                    while position < end:
                        chunk = body.read(min(_CHUNK_BYTES, end - position))
                        if not chunk:
                            raise _Broken("the body ended early")
                        position += len(chunk)
                        yield chunk
            except MpreaderError as error:
                # S3 refuses a range without bytes (416), so a stream from the end of the object ends here.
                if isinstance(error, PlanError) and end is None and position >= self.info().size:
                    return
                raise
            except _BREAKS as error:
                # After an attempt that brought bytes the count begins anew: a large body may break many times.
                failures = failures + 1 if position == reached else 1
                self._pause_or_give_up(error, failures, (position, end))

    def _open(self, position: int, end: int | None) -> tuple[Any, int]:
        """Request bytes [position, end), up to the object's end if ``end`` is None.

        Returns:
            The body, which the caller must close, and the end as a number, which the response has stated.
        """
        last = "" if end is None else end - 1  # a Range header names the last byte, not the one past it
        if_match = {"IfMatch": self._etag} if self._etag else {}
        response = self._client.call(
            "get_object",
            self._bucket,
            range=None if end is None else (position, end),
            Key=self._key,
            Range=f"bytes={position}-{last}",
            **if_match,
        )
        try:
            return response["Body"], self._check(response, position, end)
        except BaseException:
            response["Body"].close()  # otherwise its connection stays open until the response is garbage-collected
            raise

    def _check(self, response: dict[str, Any], position: int, end: int | None) -> int:
        """Accept a response only if its body will be the requested bytes of the one version; returns their end."""
        # Without Content-Encoding: the body is handed out as it is stored, so an object that was stored compressed is
        # read like any other.
        said = PartialContent(
            response["ResponseMetadata"]["HTTPStatusCode"],
            response.get("ContentRange", ""),
            response.get("ETag", ""),
            response.get("ContentLength"),
        )
        named = parse_content_range(said.content_range)
        if named is None or named.object_size is None:
            raise _Broken("the server sends the whole object in place of a range")
        # S3 sends fewer bytes for a range that ends past the object, and that would look like a wrong response.
        if end is not None and end > named.object_size:
            raise PlanError(f"the range {(position, end)} ends past the {named.object_size} bytes of {self._uri()}")
        end = named.object_size if end is None else end
        size = None if self._info is None else self._info.size
        mismatch = find_mismatch(said, start=position, end=end, etag=self._etag, object_size=size)
        if mismatch is Mismatch.VERSION:
            raise self._other_version(said.etag)
        if mismatch is Mismatch.OBJECT_SIZE:
            raise self._changed(f"it has {named.object_size} bytes now, not {size}")
        if mismatch is not None:
            raise _Broken(f"asked for bytes {position}-{end - 1}, the answer is for {said.content_range!r}")
        self._etag = said.etag  # the first response decides which version is read
        return end

    def _other_version(self, etag: str) -> Exception:
        # A response without an ETag does not show that the object has changed; the next one may have the ETag.
        if not etag:
            return _Broken("the answer names no ETag")
        return self._changed(f"its ETag is {etag} now, not {self._etag}")

    def _pause_or_give_up(self, error: BaseException, failures: int, range: tuple[int, int | None]) -> None:
        """Sleep before the next attempt, longer after each failure; raise the error after the last one."""
        if failures >= self._client.s3client_config.max_attempts:
            position, end = range
            raise ShortRead(
                f"{self._uri()}: no bytes from {position} on came in {failures} attempts: {error}",
                bucket=self._bucket,
                key=self._key,
                range=None if end is None else (position, end),
                attempts=failures,
            ) from error
        # A random pause, so that the streams of many processes don't all come back at one time.
        longest = min(_FIRST_PAUSE_S * 2**failures, _LONGEST_PAUSE_S)
        time.sleep(random.uniform(0, longest))  # noqa: S311 - jitter, not a secret

    def _changed(self, difference: str) -> ObjectChanged:
        message = f"{self._uri()} was overwritten while it was read: {difference}; read it again with a new reader"
        return ObjectChanged(message, bucket=self._bucket, key=self._key, attempts=1)

    def _uri(self) -> str:
        return f"s3://{self._bucket}/{self._key}"
