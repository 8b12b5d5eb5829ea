"""Facts of objects as responses and listings of S3 state them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["HasSize", "ListObjectsPage", "ObjectInfo"]


class HasSize(Protocol):
    """Least that must be known of an object: its size. :class:`ObjectInfo` has it, and so have others' classes."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Facts that a HEAD request or a listing states of an object.

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
    def of_head(cls, key: str, response: Mapping[str, Any]) -> ObjectInfo:
        """Read boto3's response to ``head_object``."""
        return cls._of(key, response["ContentLength"], response)

    @classmethod
    def of_listing(cls, entry: Mapping[str, Any]) -> ObjectInfo:
        """Read an entry of boto3's response to ``list_objects_v2``."""
        return cls._of(entry["Key"], entry["Size"], entry)

    @classmethod
    def _of(cls, key: str, size: int, response: Mapping[str, Any]) -> ObjectInfo:
        # A HEAD names the storage class only where it is not the standard one.
        modified = response.get("LastModified")  # some S3-compatible services leave it out
        modified_s = int(modified.timestamp()) if modified is not None else 0
        return cls(key, size, response.get("ETag", ""), modified_s, response.get("StorageClass", "STANDARD"))


@dataclass(frozen=True, slots=True)
class ListObjectsPage:
    """One page of a listing.

    Attributes:
        object_info: The page's objects, in the order of their keys.
        common_prefixes: Beginnings of the keys that hold the delimiter behind the prefix, up to that delimiter.
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
