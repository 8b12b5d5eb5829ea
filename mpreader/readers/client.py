"""S3Client: the public S3 client, which adds the making of readers to the requests of :class:`BaseS3Client`.

It is a module of its own because ``s3/`` must not import the readers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpreader.s3.client import BaseS3Client
from mpreader.s3.stream import PinnedObject

if TYPE_CHECKING:
    from mpreader.readers.base import ObjectInfo, S3Reader
    from mpreader.readers.protocols import S3ReaderConstructorProtocol

__all__ = ["S3Client"]


class S3Client(BaseS3Client):
    """S3 client that also makes readers. Thread-safe; connects at the first use, also after a fork or unpickling."""

    def get_object(
        self,
        bucket: str,
        key: str,
        *,
        object_info: ObjectInfo | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
    ) -> S3Reader:
        """Make a reader of one object. It reads only one version, which is the first that S3 names to it.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            object_info: Facts about the object from a HEAD or a listing, which save the reader a request.
            reader_constructor: Makes the reader. None: ``S3ReaderConstructor.default()``.
        """
        # Imported here: programs that only write, list or delete don't need the readers.
        from mpreader.readers.kinds import S3ReaderConstructor

        pinned = PinnedObject(self, bucket, key, object_info)
        make = reader_constructor or S3ReaderConstructor.default()
        return make(bucket=bucket, key=key, get_object_info=pinned.info, get_stream=pinned.stream)
