"""Constructors: what is configured once and then makes a reader for every object that is opened."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpreader.errors import PlanError
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, check_max_gap
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader
from mpreader.readers.dcp_optimized import FALLBACK_GUIDANCE, DCPOptimizedS3Reader
from mpreader.readers.protocols import PlanItem, StoredItem
from mpreader.readers.sequential import SequentialS3Reader

__all__ = ["DCPOptimizedConstructor", "ItemRangeConstructor"]


class ItemRangeConstructor(ABC):
    """Base of the constructors that are told the ranges of a load before its files are opened.

    Subclasses say which reader an object with known ranges gets; ``.metadata`` gets a sequential one.

    Args:
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one.

    Raises:
        TypeError: ``max_gap_size`` is not a number.
        ValueError: ``max_gap_size`` is negative.
    """

    reader_type: ClassVar[str]
    """What :meth:`S3ReaderConstructor.get_reader_type_string` calls it."""

    def __init__(self, max_gap_size: float = DEFAULT_MAX_GAP_SIZE) -> None:
        check_max_gap(max_gap_size)
        self._max_gap_size = max_gap_size
        # s3torchconnector recognises its kind of constructor by this attribute. Its keys are the URIs under which DCP
        # opens the files; files and items are in the order in which DCP reads them.
        self._item_ranges_by_file: dict[str, list[ItemRange]] = {}

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Take over the ranges of a load plan, in place of the ones before; an empty plan leaves none.

        Args:
            plan_items: The plan's items, in the order in which they will be read.
            storage_data: Where each item is stored, by its ``storage_index``.
            base_path: URI of the checkpoint.

        Raises:
            ValueError: There are plan items, but no ``storage_data``.
            PlanError: An item lies outside of the checkpoint, or has a negative offset or length.
        """
        if plan_items and not storage_data:
            raise ValueError(
                "storage_data must not be empty: it says where the plan's items are stored; "
                "call set_up_storage_reader(metadata) before prepare_local_plan(plan)"
            )
        ranges_by_file: dict[str, list[ItemRange]] = {}
        for plan_item in plan_items:
            stored = storage_data[plan_item.storage_index]
            uri = _uri_of(os.fspath(base_path), stored.relative_path)
            ranges_by_file.setdefault(uri, []).append(_range_of(stored))
        self._item_ranges_by_file = ranges_by_file

    def __call__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> S3Reader:
        """Make the reader of one file of the checkpoint.

        Raises:
            ValueError: The load plan reads nothing from this file.
        """
        if key.endswith(".metadata"):
            return SequentialS3Reader(bucket, key, get_object_info, get_stream)
        uri = f"s3://{bucket}/{key}"
        item_ranges = self._item_ranges_by_file.get(uri)
        if item_ranges is None:
            raise ValueError(
                f"no ranges are known for {uri}: the storage reader's prepare_local_plan must call "
                f"set_item_ranges_by_file with the plan that reads this file. {FALLBACK_GUIDANCE}"
            )
        return self._make_reader(bucket, key, item_ranges, get_object_info, get_stream)

    @abstractmethod
    def _make_reader(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
    ) -> S3Reader:
        """Make the reader of an object whose items are known; they may all be empty."""

    def __repr__(self) -> str:
        files = self._item_ranges_by_file
        items = sum(map(len, files.values()))
        return f"<{type(self).__name__} max_gap_size={self._max_gap_size} files={len(files)} items={items}>"


class DCPOptimizedConstructor(ItemRangeConstructor):
    """Makes a :class:`DCPOptimizedS3Reader` for every file of a checkpoint."""

    reader_type = "dcp_optimized"

    def _make_reader(
        self,
        bucket: str,
        key: str,
        item_ranges: Sequence[ItemRange],
        get_object_info: GetObjectInfo,
        get_stream: GetStream,
    ) -> S3Reader:
        return DCPOptimizedS3Reader(bucket, key, item_ranges, get_object_info, get_stream, self._max_gap_size)


def _uri_of(base_path: str, relative_path: object) -> str:
    """The URI of a file of the checkpoint, the same that the file systems of DCP build when they open it."""
    if (
        not isinstance(relative_path, str)
        or not relative_path
        or relative_path.startswith("/")
        or ".." in relative_path.split("/")
    ):
        raise PlanError(f"the checkpoint's metadata names a file outside of the checkpoint: {relative_path!r}")
    return base_path + relative_path if base_path.endswith("/") else f"{base_path}/{relative_path}"


def _range_of(stored: StoredItem) -> ItemRange:
    numbers: tuple[object, object] = (stored.offset, stored.length)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise PlanError(
            f"the checkpoint's metadata gives an item of {stored.relative_path!r} an impossible place: "
            f"offset {stored.offset!r}, length {stored.length!r}"
        )
    return ItemRange(stored.offset, stored.offset + stored.length)
