"""Protocols of reader constructors, and of the parts of a DCP load plan that are passed to them.

The storage readers of mpreader and of s3torchconnector accept any object that satisfies the constructor protocols.
Their names are s3torchconnector's, whose constructors satisfy them, too. The protocols of the plan's items stand for
classes of torch, which this module must not import.
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
        """Key of the item in the checkpoint's ``storage_data``."""


class StoredItem(Protocol):
    """Location of an item in a checkpoint (the values of DCP's ``Metadata.storage_data``)."""

    @property
    def relative_path(self) -> str:
        """Path of the file that holds the item, relative to the checkpoint."""

    @property
    def offset(self) -> int:
        """First byte of the item in that file."""

    @property
    def length(self) -> int:
        """Number of bytes of the item."""


@runtime_checkable
class S3ReaderConstructorProtocol(Protocol):
    """Constructor of readers: makes the reader of one object."""

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
    """Constructor of readers that is given the ranges of a load plan before it makes the readers."""

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Replace the ranges of the load plan.

        Args:
            plan_items: The plan's items, in the order in which they will be read.
            storage_data: Location of each item, by its ``storage_index``.
            base_path: URI of the checkpoint.
        """
