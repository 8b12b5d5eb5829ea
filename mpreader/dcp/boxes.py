"""Boxes of a load plan: selects the bytes of each stored item that the plan needs.

The storage reader and the inspection use it, so that both plan the same requests. It looks at ``.metadata`` and the
plan only, and must not read anything else of the checkpoint: what it expects of a record that was not read yet is
compared with the record when it is loaded (:mod:`mpreader.dcp.items`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from mpreader.dcp.items import PlannedItem
from mpreader.errors import PlanError
from mpreader.formats.selection import LEAST_SAVED_BYTES, MAX_RECORD_GAP_BYTES, Run, Selection, box_of, select_box
from mpreader.formats.torch_save import payload_place
from mpreader.ranges import ItemRange
from mpreader.readers.load_plan import is_extent, range_of, uri_of
from mpreader.readers.protocols import StoredItem

__all__ = ["BoxKey", "Boxes", "LoadRanges", "load_ranges", "planned_items", "select_boxes"]

BoxKey = tuple[MetadataIndex, torch.Size, torch.Size]
"""Name of a box: the stored item, and the box's offsets and lengths in it."""


class Boxes(NamedTuple):
    """Boxes of a load plan: items of which a part is wanted.

    Attributes:
        selections: What to receive of an item, by box. An item whose box is not in it is taken whole.
        files: Paths of the files that hold such items, relative to the checkpoint. Only in these, the gap between two
            ranges that are received as one is smaller than in other loads.
    """

    selections: dict[BoxKey, Selection]
    files: frozenset[str]


class LoadRanges(NamedTuple):
    """Ranges of a load.

    Attributes:
        by_file: The ranges by URI; files and items are in the order in which they are read.
        max_gap_by_file: Largest gap within one request, in bytes, for the files of which boxes are read.
    """

    by_file: dict[str, list[ItemRange]]
    max_gap_by_file: dict[str, float]


def _box_key(request: ReadItem) -> BoxKey:
    return request.storage_index, request.storage_offsets, request.lengths


def select_boxes(
    items: Iterable[ReadItem], storage_data: Mapping[MetadataIndex, StoredItem], entries: Mapping[str, Any]
) -> Boxes:
    """Select the bytes of those items of a plan of which a part is wanted, where a part is cheaper than the whole.

    Args:
        items: The plan's items.
        storage_data: Location of each stored item.
        entries: Descriptions of the tensors by name, ``state_dict_metadata`` of the checkpoint.
    """
    sizes = _ChunkSizes(entries)
    boxes: dict[MetadataIndex, dict[BoxKey, Selection | None]] = {}  # by the stored item
    files = set()
    for request in items:
        index = request.storage_index
        stored = storage_data[index]
        # Nearly all items of most loads are whole, or too small: they must not cost more than these comparisons.
        is_candidate = request.type == LoadItemType.TENSOR and stored.length > LEAST_SAVED_BYTES
        size = sizes.of(index) if is_candidate else None
        if size is not None and request.lengths != size:
            files.add(stored.relative_path)
            dtype = entries[index.fqn].properties.dtype
            boxes.setdefault(index, {})[_box_key(request)] = _select(request, stored, size, dtype)
    selections: dict[BoxKey, Selection] = {}
    for selected in boxes.values():
        known = {key: selection for key, selection in selected.items() if selection is not None}
        # Bytes that several boxes need are received once only where the whole item is.
        if len(known) == len(selected) and _are_apart(known.values()):
            selections.update(known)
    return Boxes(selections, frozenset(files))


def planned_items(
    items: Iterable[ReadItem],
    storage_data: Mapping[MetadataIndex, StoredItem],
    selections: Mapping[BoxKey, Selection],
) -> list[PlannedItem]:
    """Returns the items of a plan with their locations and selections."""
    if not selections:  # the key of each item would have to be hashed
        return [PlannedItem(request, storage_data[request.storage_index]) for request in items]
    return [
        PlannedItem(request, storage_data[request.storage_index], selections.get(_box_key(request)))
        for request in items
    ]


def load_ranges(items: Iterable[PlannedItem], files: Collection[str], base_path: str | os.PathLike[str]) -> LoadRanges:
    """Returns what is received for the items.

    Args:
        items: The items, in the order in which they will be read.
        files: Paths of the files of which boxes are read.
        base_path: URI of the checkpoint.

    Raises:
        PlanError: An item lies outside of the checkpoint, or has a negative offset or length.
    """
    ranges = LoadRanges({}, {})
    for item in items:
        uri, whole = uri_of(base_path, item.stored.relative_path), range_of(item.stored)
        of_file = ranges.by_file.setdefault(uri, [])
        if item.stored.relative_path in files:
            ranges.max_gap_by_file[uri] = MAX_RECORD_GAP_BYTES
        if item.selection is None:
            of_file.append(whole)
            continue
        for start, end in (Run(0, item.selection.front_nbytes), *item.selection.runs):
            of_file.append(ItemRange(whole.start + start, whole.start + end))
    return ranges


class _ChunkSizes:
    """Shapes of the stored pieces of tensors."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries
        self._by_offset: dict[str, dict[Any, Any]] = {}  # of the tensors whose pieces had to be searched

    def of(self, index: MetadataIndex) -> torch.Size | None:
        """Returns the shape of a stored piece; None if it is none of a tensor, or ``.metadata`` does not tell it."""
        entry = self._entries.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            return None
        chunks = entry.chunks
        hint = index.index
        if type(hint) is int and 0 <= hint < len(chunks) and chunks[hint].offsets == index.offset:
            sizes: object = chunks[hint].sizes
        else:
            if index.fqn not in self._by_offset:
                self._by_offset[index.fqn] = {chunk.offsets: chunk.sizes for chunk in chunks}
            sizes = self._by_offset[index.fqn].get(index.offset)
        return sizes if isinstance(sizes, torch.Size) else None  # a forged one may be anything


def _are_apart(selections: Iterable[Selection]) -> bool:
    runs = sorted(run for selection in selections for run in selection.runs)
    return all(run.end <= following.start for run, following in pairwise(runs))


def _select(request: ReadItem, stored: StoredItem, size: torch.Size, dtype: object) -> Selection | None:
    # What an extension has transformed has other bytes than the tensor; older torch has no such attribute.
    if getattr(stored, "transform_descriptors", None) or not isinstance(dtype, torch.dtype):
        return None
    if not is_extent(stored.offset, stored.length):
        return None
    place = payload_place(stored.length, size.numel() * dtype.itemsize)
    if place is None:
        return None
    try:
        box = box_of(size, request.storage_offsets, request.lengths)
    except PlanError:
        return None  # the loader of items refuses it, with the name of the item
    return select_box(size, box, dtype.itemsize, stored.length, place)
