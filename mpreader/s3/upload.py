"""Uploads: the requests that make an object, either one request or a multipart upload, and the size of its parts.

Used by :class:`mpreader.s3.writer.S3Writer`, which decides between the two. It starts no threads and buffers nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mpreader.errors import TransportError
from mpreader.s3.requester import Requester

__all__ = ["MultipartUpload", "next_part_bytes", "put_whole"]

# S3 takes at most 10,000 parts of at most 5 GiB each, and objects of at most 5 TiB. The size of an object is not known
# before its last byte, so parts grow with what was written: each is 1/1250 of it. That gives 1,250 parts of the first
# size; after every 1,250 further ones the size has grown by a factor of e (2.7).
_GROWTH: Final = 1250


def next_part_bytes(part_bytes: int, written: int) -> int:
    """Return the size of the next part, so that 10,000 parts are enough for any object.

    Args:
        part_bytes: Size of the first parts.
        written: Bytes in the parts so far.
    """
    return max(part_bytes, written // _GROWTH)


def put_whole(client: Requester, bucket: str, key: str, body: bytearray, storage_class: str | None) -> None:
    """Make an object with one request."""
    client.call("put_object", bucket, Key=key, Body=body, **_class(storage_class))


class MultipartUpload:
    """Multipart upload that has begun. ``send`` may be called from several threads at a time.

    S3 keeps the parts, and charges for them, until ``complete`` makes the object of them or ``abort`` deletes them.

    Raises:
        TransportError: The service refused, or could not be reached. All methods raise it.
    """

    def __init__(self, client: Requester, bucket: str, key: str, storage_class: str | None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._etags: dict[int, str] = {}
        response = client.call("create_multipart_upload", bucket, Key=key, **_class(storage_class))
        self._id: str = self._field(response, "UploadId")

    def __repr__(self) -> str:
        return f"<MultipartUpload s3://{self._bucket}/{self._key} parts={len(self._etags)}>"

    def send(self, number: int, body: bytearray) -> None:
        """Send a part; the number, counted from 1, is its place in the object."""
        response = self._client.call(
            "upload_part", self._bucket, Key=self._key, UploadId=self._id, PartNumber=number, Body=body
        )
        # Several threads write here. No lock: each writes a key of its own, and complete() is called after all of them.
        self._etags[number] = self._field(response, "ETag")

    def _field(self, response: Mapping[str, Any], name: str) -> str:
        value = response.get(name)
        if not isinstance(value, str) or not value:
            message = f"s3://{self._bucket}/{self._key}: the service's answer to the upload lacks {name}"
            raise TransportError(message, bucket=self._bucket, key=self._key, attempts=1)
        return value

    def complete(self) -> None:
        """Make the object of all parts that were sent; call it when every ``send`` has returned."""
        parts = [{"PartNumber": number, "ETag": self._etags[number]} for number in sorted(self._etags)]
        self._client.call(
            "complete_multipart_upload",
            self._bucket,
            Key=self._key,
            UploadId=self._id,
            MultipartUpload={"Parts": parts},
        )

    def abort(self) -> None:
        """Delete all parts that were sent. A part that arrives later stays, so no ``send`` may be under way."""
        self._client.call("abort_multipart_upload", self._bucket, Key=self._key, UploadId=self._id)


def _class(storage_class: str | None) -> dict[str, Any]:
    # boto3 refuses None as a value of a parameter.
    return {} if storage_class is None else {"StorageClass": storage_class}
