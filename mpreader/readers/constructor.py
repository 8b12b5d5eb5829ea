"""Constructors of the readers that are told the ranges of a load plan before its files are opened.

A storage reader, mpreader's or s3torchconnector's, tells the constructor the plan, and then has it make a reader for
each file that it opens. The constructor that starts the downloads as soon as it is told the plan is in
:mod:`mpreader.readers.read_ahead`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, check_max_gap
from mpreader.readers.base import GetObjectInfo, GetStream, S3Reader
from mpreader.readers.dcp_optimized import FALLBACK_GUIDANCE, DCPOptimizedS3Reader
from mpreader.readers.load_plan import item_ranges_by_file
from mpreader.readers.protocols import PlanItem, StoredItem
from mpreader.readers.sequential import SequentialS3Reader

__all__ = ["DCPOptimizedConstructor", "ItemRangeConstructor"]


class ItemRangeConstructor(ABC):
    """Base class of the constructors that are told a load plan.

    Subclasses make the reader of an object whose ranges are known; ``.metadata`` gets a sequential one.

    Args:
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one.

    Raises:
        TypeError: ``max_gap_size`` is not a number.
        ValueError: ``max_gap_size`` is negative.
    """

    reader_type: ClassVar[str]
    """Name of the kind of readers, for :meth:`S3ReaderConstructor.get_reader_type_string`."""

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
            storage_data: Location of each item, by its ``storage_index``.
            base_path: URI of the checkpoint.

        Raises:
            ValueError: There are plan items, but no ``storage_data``.
            PlanError: An item lies outside of the checkpoint, or has a negative offset or length.
        """
        self._item_ranges_by_file = item_ranges_by_file(plan_items, storage_data, base_path)

    def __call__(self, bucket: str, key: str, get_object_info: GetObjectInfo, get_stream: GetStream) -> S3Reader:
        """Make the reader of one file of the checkpoint.

        Raises:
            ValueError: The load plan reads nothing from this file.
        """
        if key.endswith(".metadata"):  # read before there is a plan
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
