"""Protocols of the constructors of readers, and of the parts of a DCP load plan that they are given.

The storage readers of mpreader and of s3torchconnector take any object that satisfies them; nothing here imports torch.
The two constructor protocols go by the names that s3torchconnector gave them, and its constructors satisfy them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader

__all__ = [
    "DCPS3ReaderConstructorProtocol",
    "PlanItem",
    "S3ReaderConstructorProtocol",
    "StoredItem",
]


class PlanItem(Protocol):
    """One item of a DCP load plan (``torch.distributed.checkpoint.planner.ReadItem``)."""

    @property
    def storage_index(self) -> Any:
        """Key of the item in the checkpoint's storage data."""


class StoredItem(Protocol):
    """Location of an item in a checkpoint (the values of DCP's ``Metadata.storage_data``)."""

    @property
    def relative_path(self) -> str:
        """File that holds it, relative to the checkpoint."""

    @property
    def offset(self) -> int:
        """First byte of it in that file."""

    @property
    def length(self) -> int:
        """Number of its bytes."""


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
            storage_data: Location of each item, by its ``storage_index``.
            base_path: URI of the checkpoint.
        """
