"""Facts of objects in S3: size, ETag, time and storage class, read from boto3's responses and listings.

Made by :class:`mpreader.s3.client.BaseS3Client` for its callers. Makes no requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["HasSize", "ListObjectsPage", "ObjectInfo"]


class HasSize(Protocol):
    """Object information with a size, the least that a stream must know of an object.

    :class:`ObjectInfo` has it; a protocol, so that a class of another library that has a size can be given as well.
    """

    @property
    def size(self) -> int:
        """Bytes of the whole object."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Facts of an object, as a HEAD request or a listing states them.

    Attributes:
        key: The object's key.
        size: Bytes of the whole object.
        etag: ETag as S3 wrote it, quotes included; "" where the service gives none.
        last_modified: Seconds since the epoch; 0 where the service does not state it.
        storage_class: S3's name of it, such as ``"STANDARD"``.
    """

    key: str
    size: int
    etag: str
    last_modified: int
    storage_class: str

    @classmethod
    def of_head(cls, key: str, response: Mapping[str, Any]) -> ObjectInfo:
        """Read boto3's response to ``head_object``."""
        return cls._of(key, response["ContentLength"], response)

    @classmethod
    def of_listing(cls, entry: Mapping[str, Any]) -> ObjectInfo:
        """Read an entry of boto3's response to ``list_objects_v2``."""
        return cls._of(entry["Key"], entry["Size"], entry)

    @classmethod
    def _of(cls, key: str, size: int, response: Mapping[str, Any]) -> ObjectInfo:
        modified = response.get("LastModified")  # some S3-compatible services leave it out
        modified_s = int(modified.timestamp()) if modified is not None else 0
        # A HEAD names the storage class only where it is not the standard one.
        return cls(key, size, response.get("ETag", ""), modified_s, response.get("StorageClass", "STANDARD"))


@dataclass(frozen=True, slots=True)
class ListObjectsPage:
    """One page of a listing.

    Attributes:
        object_info: The page's objects, in the order of their keys.
        common_prefixes: For the keys that have the delimiter behind the prefix: their beginnings, up to and including
            that delimiter, each named once.
    """

    object_info: tuple[ObjectInfo, ...]
    common_prefixes: tuple[str, ...]

    @classmethod
    def of(cls, response: Mapping[str, Any]) -> ListObjectsPage:
        """Read boto3's response to ``list_objects_v2``."""
        return cls(
            tuple(map(ObjectInfo.of_listing, response.get("Contents", ()))),
            tuple(entry["Prefix"] for entry in response.get("CommonPrefixes", ())),
        )
