"""Boxes of a load plan: selects the bytes of each stored item that the plan needs.

The storage reader and the inspection use it, so that both plan the same requests. It looks at ``.metadata`` and the
plan only, and must not read anything else of the checkpoint: what it expects of a record that was not read yet is
compared with the record when it is loaded (:mod:`mpreader.dcp.items`).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from mpreader.dcp.planned import PlannedItem, RawItem
from mpreader.errors import PlanError
from mpreader.formats.gaps import best_gaps
from mpreader.formats.selection import GAPS, Box, Gaps, Run, Selection, box_of, placed_runs, select_box
from mpreader.formats.torch_save import payload_place
from mpreader.ranges import ItemRange
from mpreader.readers.load_plan import is_extent, range_of, uri_of
from mpreader.readers.protocols import StoredItem

__all__ = [
    "NO_BOXES",
    "BoxKey",
    "Boxes",
    "LoadRanges",
    "box_key",
    "load_ranges",
    "needed_boxes",
    "planned_items",
    "select_boxes",
]

_MANY_BOXES: Final = 1000

BoxKey = tuple[MetadataIndex, torch.Size, torch.Size]
"""Name of a box: the stored item, and the box's offsets and lengths in it."""


class Boxes(NamedTuple):
    """Boxes of a load plan: items of which a part is wanted.

    Attributes:
        selections: What to receive of an item, by box. An item whose box is not in it is taken whole.
        files: Paths of the files that hold such items, relative to the checkpoint.
        max_gap_bytes: Largest gap that is received between two ranges of one of these files.
    """

    selections: dict[BoxKey, Selection]
    files: frozenset[str]
    max_gap_bytes: int


NO_BOXES: Final = Boxes({}, frozenset(), GAPS[-1].between_records)


class LoadRanges(NamedTuple):
    """Ranges of a load.

    Attributes:
        by_file: The ranges by URI; files and items are in the order in which they are read.
        max_gap_by_file: Largest gap within one request, in bytes, for the files of which boxes are read.
    """

    by_file: dict[str, list[ItemRange]]
    max_gap_by_file: dict[str, float]


def box_key(request: ReadItem) -> BoxKey:
    """Returns the name of the box that a plan's item wants."""
    return request.storage_index, request.storage_offsets, request.lengths


def select_boxes(
    items: Sequence[ReadItem], storage_data: Mapping[MetadataIndex, StoredItem], entries: Mapping[str, Any]
) -> Boxes:
    """Select the bytes of those items of a plan of which a part is wanted, where a part is cheaper than the whole.

    Of all plans that would not take much longer than the quickest one, the one of the fewest bytes is taken.

    Args:
        items: The plan's items.
        storage_data: Location of each stored item.
        entries: Descriptions of the tensors by name, ``state_dict_metadata`` of the checkpoint.
    """
    wanted = list(_wanted_boxes(items, storage_data, entries))
    files = frozenset(box.stored.relative_path for box in wanted)
    if not files:
        return NO_BOXES
    wanted = _without_those_of_whole_items(wanted, items)
    # With so many boxes no plan of yet more requests is the quickest, and making one takes its time, too.
    possible = GAPS if len(wanted) <= _MANY_BOXES else GAPS[1:]
    selections = {gaps: _selections(wanted, gaps) for gaps in possible}
    gaps = best_gaps(lambda gaps: _received(items, storage_data, files, selections[gaps]), possible)
    return Boxes(selections[gaps], files, gaps.between_records)


def needed_boxes(
    items: Sequence[ReadItem], storage_data: Mapping[MetadataIndex, StoredItem], entries: Mapping[str, Any]
) -> dict[BoxKey, Selection]:
    """Returns the bytes that each box needs, with no gap but those within it; what is not in it needs the whole item.

    The arguments are those of :func:`select_boxes`, which also decides if that is worth its requests.
    """
    return _selections(_wanted_boxes(items, storage_data, entries), Gaps(0, GAPS[0].within_box))


def planned_items(
    items: Iterable[ReadItem],
    storage_data: Mapping[MetadataIndex, StoredItem],
    selections: Mapping[BoxKey, Selection],
) -> list[PlannedItem]:
    """Returns the items of a plan with their locations and selections."""
    if not selections:  # the key of each item would have to be hashed
        return [PlannedItem(request, storage_data[request.storage_index]) for request in items]
    return [
        PlannedItem(request, storage_data[request.storage_index], selections.get(box_key(request))) for request in items
    ]


def load_ranges(
    items: Iterable[PlannedItem], files: Collection[str], max_gap_bytes: int, base_path: str | os.PathLike[str]
) -> LoadRanges:
    """Returns what is received for the items.

    Args:
        items: The items, in the order in which they will be read.
        files: Paths of the files of which boxes are read.
        max_gap_bytes: Largest gap that is received between two ranges of one of these files.
        base_path: URI of the checkpoint.

    Raises:
        PlanError: An item lies outside of the checkpoint, or has a negative offset or length.
    """
    ranges = LoadRanges({}, {})
    for item in items:
        uri, whole = uri_of(base_path, item.stored.relative_path), range_of(item.stored)
        of_file = ranges.by_file.setdefault(uri, [])
        if item.stored.relative_path in files:
            ranges.max_gap_by_file[uri] = max_gap_bytes
        if item.selection is None:
            of_file.append(whole)
        else:
            of_file.extend(ItemRange(start, end) for start, end in placed_runs(item.selection, whole.start))
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


class _WantedBox(NamedTuple):
    """A box of a stored item that is wanted.

    Attributes:
        key: Name of the box.
        stored: File, offset and length of the item.
        size: Shape of the stored piece.
        box: The box; None if what the plan or ``.metadata`` says can't be true, or the item has other bytes than the
            tensor: then it is taken whole.
        itemsize: Bytes of an element.
        payload: Lowest and highest place where the payload may begin.
    """

    key: BoxKey
    stored: StoredItem
    size: torch.Size
    box: Box | None
    itemsize: int = 0
    payload: tuple[int, int] = (0, 0)

    def select(self, gaps: Gaps) -> Selection | None:
        """Returns what is received of the item; None: all of it."""
        if self.box is None:
            return None
        return select_box(self.size, self.box, self.itemsize, self.stored.length, self.payload, gaps)


def _wanted_boxes(
    items: Iterable[ReadItem], storage_data: Mapping[MetadataIndex, StoredItem], entries: Mapping[str, Any]
) -> Iterator[_WantedBox]:
    sizes = _ChunkSizes(entries)
    least_nbytes = GAPS[0].between_records
    for request in items:
        index = request.storage_index
        stored = storage_data[index]
        # Nearly all items of most loads are whole, or too small: they must not cost more than these comparisons.
        is_candidate = request.type == LoadItemType.TENSOR and stored.length > least_nbytes
        size = sizes.of(index) if is_candidate else None
        if size is not None and request.lengths != size:
            yield _wanted_box(request, stored, size, entries[index.fqn].properties.dtype)


def _wanted_box(request: ReadItem, stored: StoredItem, size: torch.Size, dtype: object) -> _WantedBox:
    whole = _WantedBox(box_key(request), stored, size, None)
    # What an extension has transformed has other bytes than the tensor; older torch has no such attribute.
    if getattr(stored, "transform_descriptors", None) or not isinstance(dtype, torch.dtype):
        return whole
    if not is_extent(stored.offset, stored.length):
        return whole
    is_raw = isinstance(stored, RawItem)
    place = (0, 0) if is_raw else payload_place(stored.length, size.numel() * dtype.itemsize)
    if place is None:
        return whole
    try:
        box = box_of(size, request.storage_offsets, request.lengths)
    except PlanError:
        return whole  # the loader of items refuses it, with the name of the item
    return whole._replace(box=box, itemsize=dtype.itemsize, payload=place)


def _without_those_of_whole_items(wanted: list[_WantedBox], items: Iterable[ReadItem]) -> list[_WantedBox]:
    """Returns the boxes; none is to be selected of an item that the plan wants whole, too: it is received anyway."""
    keys = {box.key for box in wanted}
    whole = {request.storage_index for request in items if box_key(request) not in keys}
    return [box._replace(box=None) if box.key[0] in whole else box for box in wanted]


def _selections(wanted: Iterable[_WantedBox], gaps: Gaps) -> dict[BoxKey, Selection]:
    boxes: dict[MetadataIndex, list[_WantedBox]] = {}  # by the stored item; a plan may want a box twice
    for box in wanted:
        boxes.setdefault(box.key[0], []).append(box)
    selections: dict[BoxKey, Selection] = {}
    for of_item in boxes.values():
        known = [selection for box in of_item if (selection := box.select(gaps)) is not None]
        most_nbytes = of_item[0].stored.length - gaps.between_records
        if len(known) == len(of_item) and (len(known) == 1 or _requested_nbytes(known) <= most_nbytes):
            selections.update((box.key, selection) for box, selection in zip(of_item, known, strict=True))
    return selections


def _requested_nbytes(selections: Iterable[Selection]) -> int:
    """Returns the bytes of the runs of all boxes of an item; those that several boxes share count for each of them.

    They may be received for each of them: between its boxes, an item of more than a share of the arena is not held.
    """
    return sum(run.size for selection in selections for run in selection.runs)


def _received(
    items: Iterable[ReadItem],
    storage_data: Mapping[MetadataIndex, StoredItem],
    files: Collection[str],
    selections: Mapping[BoxKey, Selection],
) -> Iterable[list[Run]]:
    """Returns what is received of each of the files."""
    by_file: dict[str, list[Run]] = {path: [] for path in files}
    for request in items:
        stored = storage_data[request.storage_index]
        runs = by_file.get(stored.relative_path)
        if runs is None or not is_extent(stored.offset, stored.length):
            continue
        selection = selections.get(box_key(request)) if selections else None
        if selection is None:
            runs.append(Run(stored.offset, stored.offset + stored.length))
        else:
            runs.extend(placed_runs(selection, stored.offset))
    return by_file.values()
