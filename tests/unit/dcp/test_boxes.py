from __future__ import annotations

import io
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from mpreader.dcp import tensor as tensor_module
from mpreader.dcp.boxes import NO_BOXES, load_ranges, planned_items, select_boxes
from mpreader.dcp.items import ItemLoader, LoadedBytes
from mpreader.dcp.planned import PlannedItem, RawItem
from mpreader.formats.layout import TensorLayout
from mpreader.formats.selection import GAPS, Gaps, Run, Selection
from mpreader.formats.torch_save import decode_layout, payload_place
from mpreader.ranges import ItemRange

KiB = 1024
MiB = 1024 * KiB
URI = "s3://bucket/checkpoint/a.distcp"


def record_of(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def read_item(fqn: str, size: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> ReadItem:
    index = MetadataIndex(fqn, torch.Size([0] * len(size)), 0)
    zeros = torch.Size([0] * len(size))
    return ReadItem(LoadItemType.TENSOR, index, zeros, index, torch.Size(offsets), torch.Size(lengths))


def entry_of(tensor: torch.Tensor) -> TensorStorageMetadata:
    chunk = ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.size())
    return TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), [chunk])


class SelectedRecord:
    """Record of which only some ranges were received: what is read outside of them, or backwards, is refused."""

    def __init__(self, record: bytes, ranges: Sequence[ItemRange]) -> None:
        self._record = bytearray(record)
        self._ranges = ranges
        self._reached = 0
        self.size = len(record)

    def holds(self, start: int, end: int) -> bool:
        return any(one.start <= start and end <= one.end for one in self._ranges)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        assert self.holds(start, end)
        assert start >= self._reached
        self._reached = end
        yield memoryview(self._record)[start:end]

    def view(self, start: int, end: int) -> memoryview:
        assert self.holds(start, end)
        return memoryview(self._record)[start:end]


class OneFile:
    """Reader of a file of one record."""

    def __init__(self, record: bytes, ranges: Sequence[ItemRange]) -> None:
        self._record = record
        self._ranges = ranges

    def item(self, offset: int, length: int) -> Any:
        assert (offset, length) == (0, len(self._record))
        assert self._ranges == [ItemRange(0, length)]
        return SelectedRecord(self._record, self._ranges)

    def refetch(self, offset: int, length: int) -> Any:
        raise AssertionError("nothing is damaged")

    def selected_item(self, offset: int, length: int, first: int) -> Any:
        assert (offset, length) == (0, len(self._record))
        return SelectedRecord(self._record, self._ranges)


class Planner:
    def __init__(self, target: torch.Tensor) -> None:
        self._target = target
        self.committed = 0

    def resolve_tensor(self, request: ReadItem) -> torch.Tensor:
        return self._target

    def commit_tensor(self, request: ReadItem, tensor: torch.Tensor) -> None:
        self.committed += 1


def plan(tensor: torch.Tensor, record: bytes, offsets: Sequence[int], lengths: Sequence[int]) -> PlannedItem:
    request = read_item("w", tensor.size(), offsets, lengths)
    stored = {request.storage_index: _StorageInfo("a.distcp", 0, len(record))}
    [item] = planned_items([request], stored, select_boxes([request], stored, {"w": entry_of(tensor)}).selections)
    return item


def load(item: PlannedItem, record: bytes, target: torch.Tensor, loaded: LoadedBytes) -> PlannedItem | None:
    ranges = load_ranges([item], (), 0, "s3://bucket/checkpoint").by_file[URI]
    planner: Any = Planner(target)
    again = ItemLoader(planner, None, verify=True, loaded=loaded).load(item, URI, OneFile(record, ranges))
    assert planner.committed == (again is None)
    return again


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_box_is_loaded_from_the_selected_bytes_alone(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([(400, 600), (3, 200_000), (8, 50, 300), (150_000,), (2, 3, 5, 7000)]))
    tensor = KINDS[kind](torch.arange(torch.Size(size).numel(), dtype=torch.int32).reshape(size))
    offsets = [data.draw(st.integers(0, whole - 1)) for whole in size]
    lengths = [data.draw(st.integers(1, whole - at)) for whole, at in zip(size, offsets, strict=True)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    record = record_of(tensor)
    expected = narrow_tensor_by_index(tensor, offsets, lengths)
    target, loaded = torch.zeros(expected.shape, dtype=dtype), LoadedBytes()
    again = load(plan(tensor, record, offsets, lengths), record, target, loaded)
    if again is not None:
        assert kind != "contiguous"
        assert load(again, record, target, loaded) is None
    assert torch.equal(target, expected.to(dtype))
    assert loaded.verified + loaded.unverified > 0


def test_item_that_is_not_stored_as_expected_needs_its_own_runs_next() -> None:
    stored = torch.arange(300_000, dtype=torch.int32).reshape(600, 500).t()  # [500, 600], columns outermost
    record = record_of(stored)
    target, loaded = torch.zeros(500, 100, dtype=torch.int32), LoadedBytes()
    item = plan(stored, record, (0, 200), (500, 100))
    assert item.selection is None  # of a contiguous tensor, these columns would need all rows
    item = plan(stored, record, (200, 0), (100, 600))
    assert item.selection is not None
    target = torch.zeros(100, 600, dtype=torch.int32)
    again = load(item, record, target, loaded)
    assert again is not None
    assert again.layout is not None
    assert not target.any()
    assert load(again, record, target, loaded) is None
    assert torch.equal(target, stored[200:300])


@pytest.mark.parametrize("at", [3, 70, 200, 500])
def test_damaged_front_of_a_selected_item_makes_the_whole_item_needed(at: int) -> None:
    tensor = torch.arange(300_000, dtype=torch.int32)
    record = bytearray(record_of(tensor))
    item = plan(tensor, bytes(record), (0,), (1000,))
    assert item.selection is not None
    record[at] ^= 1
    again = load(item, bytes(record), torch.zeros(1000, dtype=torch.int32), LoadedBytes())
    assert again is None or again.selection is None  # None: the bit is one of those that have no meaning


def record_of_older_torch(tensor: torch.Tensor) -> bytes:
    """A record with the entries that torch wrote before 2.7."""
    archive, stream = zipfile.ZipFile(io.BytesIO(record_of(tensor))), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    for name in ("data.pkl", "byteorder"):
        content = archive.read(f"archive/{name}")
        writer.write_record(name, content, len(content))
    writer.write_record("data/0", tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), tensor.nbytes)
    writer.write_end_of_file()
    return stream.getvalue()


@pytest.mark.parametrize("save", [record_of, record_of_older_torch])
def test_payload_begins_where_the_length_of_the_record_says(save: Callable[[torch.Tensor], bytes]) -> None:
    lengths = [(length,) for length in range(1, 70)]  # the next entry is aligned, to 64 bytes
    for shape in [*lengths, (70_000, 3), (3, 5, 7), (2,) * 9, (128, 300, 7, 2, 2)]:
        for dtype in (torch.float32, torch.uint8, torch.float8_e4m3fn):
            tensor = torch.zeros(shape, dtype=dtype)
            record = save(tensor)
            layout = decode_layout(SelectedRecord(record, [ItemRange(0, len(record))]))
            place = payload_place(len(record), tensor.nbytes)
            assert layout is not None
            assert place is not None
            assert place[0] <= layout.payload_offset <= place[1]


def test_payload_that_does_not_fit_a_record_has_no_place() -> None:
    assert payload_place(1000, 1000) is None
    assert payload_place(1000, 2000) is None
    assert payload_place(10**9, 1000) is None


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ((0, 100), (500, 100), 2),
        ((0, 100), (50, 100), 2),
        ((0, 600), (300, 600), 0),
        ((0, 500), (500, 500), 0),
        ((0, 100), (0, 100), 1),
        ((0, 600), (0, 600), 0),
        ((0, 1000), (0, 100), 0),
    ],
    ids=["apart", "few shared", "many shared", "all together", "one twice", "large one twice", "whole, too"],
)
def test_several_boxes_of_one_item_are_taken_from_the_whole_if_that_is_fewer_bytes(
    first: tuple[int, int], second: tuple[int, int], count: int
) -> None:
    tensor = torch.zeros(1000, 1000)
    items = [read_item("w", tensor.size(), (row, 0), (length, 1000)) for row, length in (first, second)]
    stored = {items[0].storage_index: _StorageInfo("a.distcp", 0, 4_001_577)}
    boxes = select_boxes(items, stored, {"w": entry_of(tensor)})
    assert (len(boxes.selections), boxes.files) == (count, frozenset({"a.distcp"}))


@pytest.mark.parametrize(
    "stored",
    [
        _StorageInfo("a.distcp", 0, 4_001_577, ["zstd"]),
        _StorageInfo("a.distcp", 0, 4_000_000),
        _StorageInfo("a.distcp", -1, 4_001_577),
    ],
    ids=["transformed", "too short", "nowhere"],
)
def test_item_that_is_not_understood_is_taken_whole(stored: _StorageInfo) -> None:
    tensor = torch.zeros(1000, 1000)
    request = read_item("w", tensor.size(), (0, 0), (100, 1000))
    storage_data = {request.storage_index: stored}
    boxes = select_boxes([request], storage_data, {"w": entry_of(tensor)})
    assert (boxes.selections, boxes.files) == ({}, frozenset({"a.distcp"}))
    assert select_boxes([request], storage_data, {}) is NO_BOXES


def test_raw_item_is_selected_from_without_a_front() -> None:
    tensor = torch.zeros(1000, 1000)
    request = read_item("w", tensor.size(), (200, 0), (100, 1000))
    layout = TensorLayout(torch.float32, (1000, 1000), (1000, 1), 0, 0, 4_000_000, has_crc=False)
    storage_data = {request.storage_index: RawItem("a.safetensors", 77, 4_000_000, layout)}
    boxes = select_boxes([request], storage_data, {"w": entry_of(tensor)})
    items = planned_items([request], storage_data, boxes.selections)
    assert items[0].selection == Selection(0, (Run(800_000, 1_200_000),), GAPS[0].within_box)


@pytest.mark.row("hostile .metadata")
def test_forged_number_of_runs_reserves_little() -> None:
    size = torch.Size([1_000_000, 1 << 20])  # one element of each row is wanted
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), size)
    entries = {"w": TensorStorageMetadata(TensorProperties(torch.int32), size, [chunk])}
    request = read_item("w", size, (0, 7), (1_000_000, 1))
    stored = {request.storage_index: _StorageInfo("a.distcp", 0, size.numel() * 4 + 1577)}
    tracemalloc.start()
    try:
        boxes = select_boxes([request], stored, entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert boxes.selections == {}
    assert peak < 100 * KiB


def test_gaps_are_smaller_in_files_of_which_boxes_are_read() -> None:
    tensor = torch.zeros(1000, 1000)
    for rows, files in ((1000, {}), (999, {URI: GAPS[0].between_records})):
        request = read_item("w", tensor.size(), (0, 0), (rows, 1000))
        storage_data = {request.storage_index: _StorageInfo("a.distcp", 0, 4_001_577)}
        boxes = select_boxes([request], storage_data, {"w": entry_of(tensor)})
        assert boxes.selections == {}  # hardly anything could be left out
        items = planned_items([request], storage_data, boxes.selections)
        ranges = load_ranges(items, boxes.files, boxes.max_gap_bytes, "s3://bucket/checkpoint")
        assert ranges == ({URI: [ItemRange(0, 4_001_577)]}, files)


def test_block_of_the_copier_is_not_larger_than_a_gap_within_a_run() -> None:
    """Else it would read, in rows that are no larger than a block, gaps that were not received."""
    assert all(gaps.within_box >= tensor_module._BLOCK_NBYTES for gaps in GAPS)


def sliced_plan(count: int, nbytes: int) -> tuple[list[ReadItem], dict[MetadataIndex, _StorageInfo], dict[str, Any]]:
    """Returns a plan of the second quarter of the rows of each of ``count`` tensors, side by side in one file."""
    tensor = torch.empty(nbytes // 1024, 1024, dtype=torch.uint8, device="meta")
    rows = nbytes // 4096
    requests = [read_item(f"w{i}", tensor.size(), (rows, 0), (rows, 1024)) for i in range(count)]
    record = nbytes + 1600
    stored = {request.storage_index: _StorageInfo("a.distcp", i * record, record) for i, request in enumerate(requests)}
    return requests, stored, {f"w{i}": entry_of(tensor) for i in range(count)}


@pytest.mark.parametrize(
    ("count", "nbytes", "gaps"),
    [
        (32, 256 * KiB, GAPS[0]),  # few: each has a connection of its own
        (300, 2 * MiB, GAPS[0]),
        (10_000, 256 * KiB, GAPS[2]),  # many small ones: requests for each would take fifteen times as long
        (100, 8 * MiB, GAPS[0]),
        (1000, 512 * KiB, GAPS[2]),
        (10_000, 64 * MiB, GAPS[1]),  # many large ones: bytes take longer than requests
    ],
)
def test_more_bytes_are_received_where_requests_would_take_longer(count: int, nbytes: int, gaps: Gaps) -> None:
    boxes = select_boxes(*sliced_plan(count, nbytes))
    assert boxes.max_gap_bytes == gaps.between_records
    assert len(boxes.selections) == (0 if gaps is GAPS[2] else count)
