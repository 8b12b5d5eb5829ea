"""Boxes of tensors of every type and layout that torch saves: what is loaded is what torch's own reader loads."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import PoolConfig
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*Complex.* support is experimental"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=256 * KiB)

State = dict[str, torch.Tensor]
Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and lengths."""

ROW_NBYTES = 1024
NUMBERS = torch.randint(0, 256, (1024, ROW_NBYTES), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Subclass(torch.Tensor):
    """A type of tensor that torch does not know."""


class Boxes(DefaultLoadPlanner):
    """Loads boxes of every tensor: for each, one item from the stored box into the same box of the target."""

    def __init__(self, boxes: Callable[[torch.Size], Iterable[Box]]) -> None:
        super().__init__()
        self._boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[box for item in plan.items for box in self._of(item)])

    def _of(self, item: ReadItem) -> list[ReadItem]:
        return [
            dataclasses.replace(item, dest_offsets=at, storage_offsets=at, lengths=torch.Size(lengths))
            for at, lengths in ((torch.Size(offsets), lengths) for offsets, lengths in self._boxes(item.lengths))
        ]


def part(start: float, stop: float) -> Callable[[int], tuple[int, int]]:
    """Returns what makes the offset and the length of a part of a dimension."""
    return lambda length: (int(start * length), int(stop * length) - int(start * length))


def one_box(*parts: Callable[[int], tuple[int, int]]) -> Callable[[torch.Size], list[Box]]:
    """Returns what makes the box of those parts of the first dimensions, and all of the others."""

    def boxes(size: torch.Size) -> list[Box]:
        ranges = [cut(length) for cut, length in zip(parts, size, strict=False)]
        ranges += [(0, length) for length in size[len(ranges) :]]
        return [([start for start, _ in ranges], [length for _, length in ranges])]

    return boxes


def halves_of_a_part(size: torch.Size) -> list[Box]:
    # Not in the order in which they are stored; and both are of one item.
    return [box for cut in (part(0.75, 0.875), part(0.25, 0.375)) for box in one_box(cut)(size)]


BOXES = {
    "rows": one_box(part(0.5, 0.75)),
    "last row": one_box(lambda length: (length - 1, 1)),
    "columns": one_box(part(0, 1), part(0.25, 0.5)),
    "inner box": one_box(part(0.3, 0.8), part(0.1, 0.9)),
    "one element": one_box(*[lambda length: (length // 2, 1)] * 4),
    "nothing": one_box(lambda length: (length // 2, 0)),
    "two boxes": halves_of_a_part,
}


def is_saved(dtype: torch.dtype) -> bool:
    """Returns True if torch saves and loads tensors of this type; of some it has no more than the name."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tensor = NUMBERS[:16, :16].contiguous().view(dtype)
            save({"tensor": tensor}, storage_writer=FileSystemWriter(folder), no_dist=True)
            load({"tensor": torch.empty_like(tensor)}, storage_reader=FileSystemReader(folder), no_dist=True)
        except (CheckpointException, RuntimeError):
            return False
    return True


def of_all_types() -> State:
    types = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
    types = [dtype for dtype in types if is_saved(dtype)]
    return {f"{dtype}": (NUMBERS % 2 if dtype == torch.bool else NUMBERS).view(dtype) for dtype in types}


def of_all_layouts() -> State:
    numbers = NUMBERS.view(torch.float32)  # [1024, 256]
    complex_numbers = NUMBERS.view(torch.complex64)
    return {
        "plain": numbers,
        "transposed": numbers.reshape(256, 1024).t(),
        "channels last": numbers.reshape(16, 64, 16, 16).contiguous(memory_format=torch.channels_last),
        "permuted": numbers.reshape(64, 64, 64).permute(1, 2, 0),
        "piece of a storage": numbers[100:900],
        "every other": numbers[::2, ::2],
        "expanded": numbers[:1].expand(1024, 256),
        "expanded columns": numbers[:, :1].expand(1024, 256),
        # As many elements as the storage has, so that torch saves them as they are.
        "overlapping": numbers.flatten().as_strided((1024, 256), (1, 1)),
        "overlapping, with an offset": numbers.flatten().as_strided((1024, 256), (128, 1), 1000),
        "zero strides": numbers.flatten().as_strided((1024, 256), (0, 1), 77),
        "conjugated": complex_numbers.conj(),
        "negated": complex_numbers.conj().imag,
        "odd rows": NUMBERS.flatten()[: 1021 * 1021].reshape(1021, 1021),
        "one row": numbers.reshape(1, -1),
        "one column": numbers.reshape(-1, 1),
        "flat": numbers.flatten(),
        "many dimensions": numbers.reshape(4, 1, 32, 1, 4, 4, 128),
        "odd strides of ones": numbers.as_strided((1024, 1, 256), (256, 7, 1)),
        "requires grad": torch.nn.Parameter(numbers.clone()),
        "no rows": numbers[:0],
        "no columns": numbers[:, :0],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "one": torch.tensor([3]),
    }


def upload(folder: Path, bucket: str) -> None:
    client = boto3.session.Session().client("s3")
    for file in folder.iterdir():
        client.put_object(Bucket=bucket, Key=f"checkpoint/{file.name}", Body=file.read_bytes())


@pytest.fixture
def reader(bucket: str) -> Iterator[S3StorageReader]:
    with S3StorageReader(None, f"s3://{bucket}/checkpoint", pool_config=POOL) as reader:
        yield reader


def load_both(
    folder: Path, reader: S3StorageReader, make: Callable[[], State], boxes: Callable[[torch.Size], Iterable[Box]]
) -> None:
    """Load with torch's reader and with mpreader's, and compare every bit."""
    expected, state = make(), make()
    load(expected, storage_reader=FileSystemReader(folder), planner=Boxes(boxes), no_dist=True)
    load(state, storage_reader=reader, planner=Boxes(boxes), no_dist=True)
    for name, value in expected.items():
        assert bits(state[name]) == bits(value), name


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(plain.flatten().view(torch.uint8).numpy())


def empty(state: State) -> State:
    """Tensors of zeros to load into; torch can't make some types of them by itself."""
    zeros = {
        name: torch.zeros(value.numel() * value.dtype.itemsize, dtype=torch.uint8) for name, value in state.items()
    }
    return {name: zeros[name].view(value.dtype).reshape(value.shape) for name, value in state.items()}


@pytest.fixture
def saved(bucket: str, tmp_path: Path) -> Callable[..., Path]:
    """Saves a state with torch, and uploads it."""

    def save_and_upload(state: State, **options: Any) -> Path:
        save(state, storage_writer=FileSystemWriter(tmp_path, **options), no_dist=True)
        upload(tmp_path, bucket)
        return tmp_path

    return save_and_upload


def test_boxes_of_every_type(reader: S3StorageReader, saved: Callable[..., Path]) -> None:
    state = of_all_types()
    floats = {f"torch.{name}" for name in dir(torch) if name.startswith(("float8_", "bfloat16"))}
    assert floats | {"torch.bool", "torch.complex32", "torch.uint64"} <= state.keys()
    folder = saved(state)
    for name, boxes in BOXES.items():
        load_both(folder, reader, lambda: empty(state), boxes)
        if name == "rows":
            needed = len(state) * 256 * KiB
            assert needed <= reader.stats.bytes <= 1.02 * needed  # of no type more than the rows
            assert reader.stats.unverified_bytes == needed


def test_boxes_of_every_layout(reader: S3StorageReader, saved: Callable[..., Path]) -> None:
    state = of_all_layouts()
    folder = saved(state)
    for boxes in BOXES.values():
        load_both(folder, reader, lambda: empty(state), boxes)


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
def test_boxes_into_targets_of_other_types_and_layouts(
    reader: S3StorageReader, saved: Callable[..., Path], boxes: Callable[[torch.Size], Iterable[Box]]
) -> None:
    numbers = NUMBERS.view(torch.int16).float()  # [1024, 512], without a NaN
    folder = saved(dict.fromkeys(["half", "whole numbers", "transposed", "strided", "conjugated", "negated"], numbers))

    def targets() -> State:
        complex_numbers = torch.zeros(1024, 512, dtype=torch.complex64)
        return {
            "half": torch.zeros(1024, 512, dtype=torch.bfloat16),
            "whole numbers": torch.zeros(1024, 512, dtype=torch.int64),
            "transposed": torch.zeros(512, 1024).t(),
            "strided": torch.zeros(2048, 1024)[::2, ::2],
            "conjugated": complex_numbers.conj(),
            "negated": torch.zeros(1024, 512, dtype=torch.complex64).conj().imag,
        }

    load_both(folder, reader, targets, boxes)


def test_boxes_of_what_an_extension_has_transformed(reader: S3StorageReader, saved: Callable[..., Path]) -> None:
    state = {"numbers": NUMBERS, "zeros": torch.zeros(1024, 256)}
    folder = saved(state, _extensions=[ZStandard()])
    for boxes in BOXES.values():
        load_both(folder, reader, lambda: {name: torch.ones_like(value) for name, value in state.items()}, boxes)


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*uantizer")
@pytest.mark.parametrize(
    "stored",
    [
        lambda: torch.quantize_per_tensor(NUMBERS.float(), 0.1, 3, torch.qint8),
        lambda: torch.quantize_per_channel(NUMBERS.float(), torch.ones(1024), torch.zeros(1024), 0, torch.quint8),
        lambda: NUMBERS.float().as_subclass(Subclass),
    ],
    ids=["quantized", "quantized by channels", "subclass"],
)
def test_box_that_torch_does_not_load_raises_the_same_error(
    reader: S3StorageReader, saved: Callable[..., Path], stored: Callable[[], torch.Tensor]
) -> None:
    folder = saved({"tensor": stored()})
    errors = []
    for each in (FileSystemReader(folder), reader):
        target = torch.zeros(1024, ROW_NBYTES)
        with pytest.raises(CheckpointException) as raised:
            load({"tensor": target}, storage_reader=each, planner=Boxes(BOXES["rows"]), no_dist=True)
        [(error, _)] = raised.value.failures.values()
        errors.append((type(error), str(error)))
    assert errors[0] == errors[1]
