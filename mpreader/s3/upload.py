"""Uploads: an object is made of bytes by one request, or by a multipart upload.

Used by :class:`mpreader.s3.writer.S3Writer`, which decides between the two, and runs the threads.
"""

from __future__ import annotations

from typing import Any, Final

from mpreader.s3.requester import Requester

__all__ = ["MultipartUpload", "next_part_bytes", "put_whole"]

# S3 takes 10,000 parts of at most 5 GiB, and objects of at most 5 TiB. Parts of 1/1250 of what was written make
# 1,250 parts of the smallest size, and then grow e-fold with every 1,250 more.
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
    """A multipart upload that has begun. Parts may be sent from several threads.

    The parts cost money until ``complete`` makes the object of them, or ``abort`` deletes them.

    Raises:
        TransportError: The service refused, or could not be reached; the same for all methods.
    """

    def __init__(self, client: Requester, bucket: str, key: str, storage_class: str | None) -> None:
        self._client = client
        self._bucket = bucket
        self._key = key
        self._etags: dict[int, str] = {}
        response = client.call("create_multipart_upload", bucket, Key=key, **_class(storage_class))
        self._id: str = response["UploadId"]

    def __repr__(self) -> str:
        return f"<MultipartUpload s3://{self._bucket}/{self._key} parts={len(self._etags)}>"

    def send(self, number: int, body: bytearray) -> None:
        """Send part ``number``, counted from 1."""
        response = self._client.call(
            "upload_part", self._bucket, Key=self._key, UploadId=self._id, PartNumber=number, Body=body
        )
        self._etags[number] = response["ETag"]

    def complete(self) -> None:
        """Make the object of all parts that were sent."""
        parts = [{"PartNumber": number, "ETag": self._etags[number]} for number in sorted(self._etags)]
        self._client.call(
            "complete_multipart_upload",
            self._bucket,
            Key=self._key,
            UploadId=self._id,
            MultipartUpload={"Parts": parts},
        )

    def abort(self) -> None:
        """Delete all parts that were sent."""
        self._client.call("abort_multipart_upload", self._bucket, Key=self._key, UploadId=self._id)


def _class(storage_class: str | None) -> dict[str, Any]:
    return {} if storage_class is None else {"StorageClass": storage_class}
