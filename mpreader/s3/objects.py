"""Facts of objects in S3: size, ETag, time and storage class, read from boto3's responses and listings.

Made by :class:`mpreader.s3.client.BaseS3Client` for its callers. Makes no requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any, Protocol

from mpreader.pool.worker.version import ObjectVersion, Validators, validators_of

__all__ = ["HasSize", "ListObjectsPage", "ObjectInfo", "validators_of_info"]


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
        validators: All validators that the service has sent, the ETag among them.
        encoding: ``Content-Encoding`` of the object; "" where it has none, and in a listing.
    """

    key: str
    size: int
    etag: str
    last_modified: int
    storage_class: str
    # Not compared: an object's facts are the same, whether a HEAD or a listing has stated them.
    validators: Validators = field(default=(), compare=False, repr=False)
    encoding: str = field(default="", compare=False, repr=False)

    @property
    def version(self) -> ObjectVersion:
        """Size and validators, by which this version is told from others."""
        return ObjectVersion.of(self.size, validators_of_info(self), self.encoding)

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
        headers: Mapping[str, str] = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})  # none in a listing
        return cls(
            key,
            size,
            response.get("ETag") or "",  # None where the service sends an empty one
            modified_s,
            response.get("StorageClass") or "STANDARD",  # a HEAD names it only where it is not the standard one
            validators_of(headers),
            headers.get("content-encoding", ""),
        )


def validators_of_info(info: HasSize) -> Validators:
    """Validators that facts of an object have; they may be those of another library, which has an ETag and a time."""
    validators = dict(getattr(info, "validators", ()))
    etag, modified = getattr(info, "etag", None), getattr(info, "last_modified", None)
    if etag:
        validators["etag"] = etag
    elif isinstance(modified, int) and modified > 0:  # of a listing, say, which has no headers
        validators.setdefault("last-modified", formatdate(modified, usegmt=True))
    return tuple(sorted(validators.items()))


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
