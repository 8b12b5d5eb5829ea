"""Constructors of readers that are given the ranges of a load plan before the files of the plan are opened.

They are used by the storage readers of mpreader and s3torchconnector: a storage reader passes the plan to the
constructor, and later calls it to make a reader for each file that it opens. This module holds the base class, and the
constructor of :class:`DCPOptimizedS3Reader`. The constructor that starts to download as soon as it is given the plan is
in :mod:`mpreader.readers.multiprocess_constructor`. This module must not import torch, nor the worker pool.
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
    """Base class of the constructors that are given a load plan.

    Subclasses make the reader of a file whose ranges are known. ``.metadata`` files get a :class:`SequentialS3Reader`.

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
        # Ranges of the items by the URI under which DCP opens the file; files and items are in the order in which DCP
        # reads them. The name is s3torchconnector's, which recognises constructors of this kind by the attribute.
        self._item_ranges_by_file: dict[str, list[ItemRange]] = {}

    def set_item_ranges_by_file(
        self,
        plan_items: Sequence[PlanItem],
        storage_data: Mapping[Any, StoredItem],
        base_path: str | os.PathLike[str],
    ) -> None:
        """Replace the ranges of the load plan. After an empty plan no ranges are known.

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
        if key.endswith(".metadata"):  # DCP reads it before there is a plan: the plan is made from it
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
        """Make the reader of a file whose items are known. There is at least one item, but all may be empty."""

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
