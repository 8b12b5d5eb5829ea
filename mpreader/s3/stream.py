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
from botocore.exceptions import BotoCoreError, ClientError

from mpreader.config import MiB
from mpreader.errors import MpreaderError, ObjectChanged, PlanError, ShortRead, TransportError
from mpreader.pool.worker.partial_content import Mismatch, PartialContent, find_mismatch, is_compressed
from mpreader.pool.worker.version import Difference, Validators, find_difference, is_strong, merged, validators_of
from mpreader.s3.objects import HasSize, validators_of_info
from mpreader.s3.requester import Requester

__all__ = ["PinnedObject"]

_CHUNK_BYTES: Final = 1 * MiB  # most bytes of one receive, and so the memory that a stream takes
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 5.0
# Statuses that are never for If-Match. All others may be: some services don't know it (400, 501), or can't compare the
# ETag that they have sent themselves (412), since it is a weak one, or since a proxy has changed it.
_NOT_FOR_IF_MATCH: Final = (0, 404, 410, 416, 429, 503)


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
        object_info: Facts of the object, if they are known already. If they have an ``etag``, or a time of
            modification, only that version is read.
    """

    def __init__(self, client: Requester, bucket: str, key: str, object_info: HasSize | None = None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._info = object_info
        # What responses have said of the version so far; None and empty until it is decided.
        self._size = None if object_info is None else object_info.size
        self._validators: Validators = () if object_info is None else validators_of_info(object_info)

    def __repr__(self) -> str:
        return f"<PinnedObject s3://{self._bucket}/{self._key} {self._etag}>"

    @property
    def _etag(self) -> str:
        return dict(self._validators).get("etag", "")

    def info(self) -> HasSize:
        """Return the object's size and version; makes one HEAD request, the first time.

        Raises:
            ObjectChanged: A stream has seen another version.
            TransportError: As for :meth:`mpreader.s3.client.BaseS3Client.head_object`.
        """
        if self._info is None:
            info = self._client.head_object(self._bucket, self._key)
            found = validators_of_info(info)
            difference = find_difference(self._validators, found)
            # Some services tell less with a HEAD than with a GET. The size is all that is taken from one that tells
            # nothing, and it must be that of the bytes that were read.
            if difference is not None and (found or info.size != self._size):
                error = self._other_version(difference)
                if isinstance(error, _Broken):  # which only a stream knows to repeat
                    raise TransportError(f"{self._uri()}: {error}", bucket=self._bucket, key=self._key, attempts=1)
                raise error
            if self._size not in (info.size, None):
                raise self._changed(f"it has {info.size} bytes now, not {self._size}", None)
            self._validators, self._size, self._info = merged(self._validators, found), info.size, info
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
                response, end = self._open(position, end)
                with contextlib.closing(response["Body"]) as body:
                    yield b""
                    while position < end:
                        chunk = body.read(min(_CHUNK_BYTES, end - position))
                        if not chunk:
                            raise _Broken("the body ended early")
                        # The end of a body that does not state its length is known only when it comes.
                        is_last = position + len(chunk) == end
                        if is_last and response.get("ContentLength") is None and body.read(1):
                            raise _Broken("more bytes came than were asked for")
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

    def _open(self, position: int, end: int | None) -> tuple[dict[str, Any], int]:
        """Request bytes [position, end), up to the object's end if ``end`` is None.

        Returns:
            The response, whose body the caller must close, and the end as a number, which the response has stated.
        """
        if not is_strong(self._etag) or self._bucket in self._client.unconditional_buckets:
            return self._accepted(position, end)
        try:
            return self._accepted(position, end, IfMatch=self._etag)
        except TransportError as error:
            if _status_of(error) in _NOT_FOR_IF_MATCH:
                raise
        # If the object was overwritten, this raises an error that names the new version.
        accepted = self._accepted(position, end)
        self._client.unconditional_buckets.add(self._bucket)
        return accepted

    def _accepted(self, position: int, end: int | None, **if_match: str) -> tuple[dict[str, Any], int]:
        last = "" if end is None else end - 1  # a Range header names the last byte, not the one past it
        response = self._client.call(
            "get_object",
            self._bucket,
            range=None if end is None else (position, end),
            Key=self._key,
            Range=f"bytes={position}-{last}",
            **if_match,
        )
        try:
            return response, self._check(response, position, end)
        except BaseException:
            response["Body"].close()  # otherwise its connection stays open until the response is garbage-collected
            raise

    def _check(self, response: dict[str, Any], position: int, end: int | None) -> int:
        """Accept a response only if its body will be the requested bytes of the one version; returns their end."""
        metadata = response["ResponseMetadata"]
        headers: dict[str, str] = metadata["HTTPHeaders"]
        said = PartialContent(
            metadata["HTTPStatusCode"],
            response.get("ContentRange") or "",
            response.get("ContentLength"),
            validators_of(headers),
            headers.get("content-encoding", ""),
        )
        # Some responses don't tell by themselves how long the object is, or whether it is stored as it comes.
        is_whole = said.status == 200 and is_compressed(said.encoding)
        if self._info is None and (is_whole or said.length is None or said.object_size is None):
            self.info()
        stated = self._size if said.object_size is None else said.object_size
        if stated is None:
            raise _Broken("the server does not state the object's size")
        # S3 sends fewer bytes for a range that ends past the object, and that would look like a wrong response.
        if end is not None and end > stated:
            raise PlanError(f"the range {(position, end)} ends past the {stated} bytes of {self._uri()}")
        end = stated if end is None else end
        mismatch = find_mismatch(
            said,
            start=position,
            end=end,
            object_size=self._size,
            validators=self._validators,
            encoding=getattr(self._info, "encoding", ""),
        )
        if mismatch is not None:
            raise self._refused(mismatch, said, position, end)
        # The first response decides which version is read.
        self._size, self._validators = stated, merged(self._validators, said.validators)
        return end

    def _refused(self, mismatch: Mismatch, said: PartialContent, position: int, end: int) -> Exception:
        """Make the error for a response that does not fit the request."""
        difference = find_difference(self._validators, said.validators)
        if mismatch is Mismatch.VERSION and difference is not None:
            return self._other_version(difference, (position, end))
        if mismatch is Mismatch.OBJECT_SIZE:
            return self._changed(f"it has {said.object_size} bytes now, not {self._size}", (position, end))
        if mismatch is Mismatch.STATUS:
            return _Broken("the server sends the whole object in place of a range")
        if mismatch is Mismatch.ENCODING:
            return _Broken(f"the server compresses the answer ({said.encoding[:40]})")
        return _Broken(f"asked for bytes {position}-{end - 1}, the answer is for {said.content_range!r}")

    def _other_version(self, difference: Difference, range: tuple[int, int] | None = None) -> Exception:
        # A response without an ETag, say, does not show that the object has changed; the next one may have it.
        if not difference.is_change:
            return _Broken(f"the answer names no {difference.header}")
        return self._changed(str(difference), range)

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

    def _changed(self, difference: str, range: tuple[int, int] | None) -> ObjectChanged:
        message = f"{self._uri()} was overwritten while it was read: {difference}; read it again with a new reader"
        return ObjectChanged(message, bucket=self._bucket, key=self._key, range=range, attempts=1)

    def _uri(self) -> str:
        return f"s3://{self._bucket}/{self._key}"


def _status_of(error: TransportError) -> int:
    """Status of the service's refusal that an error was raised from; 0 if it was none."""
    refusal = error.__cause__
    if not isinstance(refusal, ClientError):
        return 0
    return int(refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
