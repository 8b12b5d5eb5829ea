"""What S3 tells of objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ListObjectsPage", "ObjectInfo"]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a HEAD request or a listing tells of an object.

    Attributes:
        key: The object's key.
        size: Bytes of the whole object.
        etag: ETag as S3 wrote it, quotes included.
        last_modified: Seconds since the epoch; 0 where the service does not say.
        storage_class: Such as ``"STANDARD"``.
    """

    key: str
    size: int
    etag: str
    last_modified: int
    storage_class: str

    @classmethod
    def of_head(cls, key: str, answer: Mapping[str, Any]) -> ObjectInfo:
        """Read boto3's answer to ``head_object``."""
        return cls._of(key, answer["ContentLength"], answer)

    @classmethod
    def of_listing(cls, entry: Mapping[str, Any]) -> ObjectInfo:
        """Read an entry of boto3's answer to ``list_objects_v2``."""
        return cls._of(entry["Key"], entry["Size"], entry)

    @classmethod
    def _of(cls, key: str, size: int, answer: Mapping[str, Any]) -> ObjectInfo:
        # A HEAD names the storage class only where it is not the standard one.
        modified = answer.get("LastModified")  # some S3-compatible services leave it out
        modified_s = int(modified.timestamp()) if modified is not None else 0
        return cls(key, size, answer.get("ETag", ""), modified_s, answer.get("StorageClass", "STANDARD"))


@dataclass(frozen=True, slots=True)
class ListObjectsPage:
    """One page of a listing.

    Attributes:
        object_info: The page's objects, in the order of their keys.
        common_prefixes: What keys that hold the delimiter behind the prefix begin with, up to that delimiter.
    """

    object_info: tuple[ObjectInfo, ...]
    common_prefixes: tuple[str, ...]

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> ListObjectsPage:
        """Read boto3's answer to ``list_objects_v2``."""
        return cls(
            tuple(map(ObjectInfo.of_listing, answer.get("Contents", ()))),
            tuple(entry["Prefix"] for entry in answer.get("CommonPrefixes", ())),
        )
