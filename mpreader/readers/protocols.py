"""What readers and their constructors expect of others, and what others may expect of them.

The two constructor protocols go by the names that s3torchconnector gave them, and its constructors satisfy them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from mpreader.readers.base import S3Reader

__all__ = [
    "DCPS3ReaderConstructorProtocol",
    "GetObjectInfo",
    "GetStream",
    "ObjectInfo",
    "PlanItem",
    "S3ReaderConstructorProtocol",
    "StoredItem",
]


class ObjectInfo(Protocol):
    """What a HEAD request tells of an object."""

    @property
    def size(self) -> int:
        """Bytes of the whole object."""


class GetObjectInfo(Protocol):
    """Asks for the object's size; called once per reader at most."""

    def __call__(self) -> ObjectInfo:
        """Ask."""


class GetStream(Protocol):
    """Opens a stream of the object's bytes."""

    def __call__(self, start: int | None = None, end: int | None = None) -> Iterator[bytes]:
        """Open a stream.

        Args:
            start: First byte of the object to send. None: 0.
            end: One past the last byte to send. None: the object's size.
        """


class PlanItem(Protocol):
    """One item of a DCP load plan (``torch.distributed.checkpoint.planner.ReadItem``)."""

    @property
    def storage_index(self) -> Any:
        """Key of the item in the checkpoint's storage data."""


class StoredItem(Protocol):
    """Where a checkpoint keeps an item (the values of DCP's ``Metadata.storage_data``)."""

    @property
    def relative_path(self) -> str:
        """The file that holds it, relative to the checkpoint."""

    @property
    def offset(self) -> int:
        """Its first byte in that file."""

    @property
    def length(self) -> int:
        """Its number of bytes."""


@runtime_checkable
class S3ReaderConstructorProtocol(Protocol):
    """Makes the reader of one object."""

    def __call__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> S3Reader:
        """Make a reader.

        Args:
            bucket: The object's bucket.
            key: The object's key.
            get_object_info: Asks for the object's size.
            get_stream: Opens a stream of the object's bytes.
        """


@runtime_checkable
class DCPS3ReaderConstructorProtocol(S3ReaderConstructorProtocol, Protocol):
    """Makes readers that know beforehand which bytes will be read."""

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Take over the ranges of a load plan.

        Args:
            plan_items: The plan's items, in the order in which they will be read.
            storage_data: Where each item is stored.
            base_path: URI of the checkpoint.
        """
