"""Damaged records: the right tensor or an error, and never more memory than the record has bytes."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader.dcp.tensor import copy_into, load_whole
from mpreader.errors import PlanError
from mpreader.formats.layout import TensorLayout
from mpreader.formats.torch_save import RecordCorrupted, decode_layout

if TYPE_CHECKING:
    from tests.fuzz.conftest import Mutant, Mutants

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

fuzzed = settings(max_examples=int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200")))

MOST_ELEMENTS = 1 << 16


class Item:
    """A record in pieces; refuses, loudly, to be read outside of its bounds. See ``ItemBytes``."""

    def __init__(self, record: bytes, piece_bytes: int) -> None:
        self._record = bytearray(record)
        self._piece_bytes = piece_bytes
        self.size = len(record)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        assert 0 <= start <= end <= self.size, (start, end, self.size)
        for at in range(start, end, self._piece_bytes):
            yield memoryview(self._record)[at : min(at + self._piece_bytes, end)]

    def view(self, start: int, end: int) -> memoryview:
        return memoryview(bytearray(b"".join(self.pieces(start, end))))


class Geometry(NamedTuple):
    """Geometry that a record's pickle gives its tensor, in torch's own words."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    nbytes: int


def geometry_of(tensor: torch.Tensor) -> Geometry:
    nbytes = int(tensor.untyped_storage().nbytes())
    return Geometry(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), nbytes)


def payload_of(tensor: torch.Tensor) -> bytes:
    return bytes(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).tolist())


def bits(tensor: torch.Tensor) -> bytes:
    flat = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor).reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def record_of(value: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (6000,), dtype=torch.uint8, generator=generator)
    grid = noise[:240].clone().view(torch.float32).reshape(6, 10)
    names = ("float64", "float16", "bfloat16", "int64", "int8", "complex64", "complex32", "uint16", "float8_e4m3fn")
    dtypes = [getattr(torch, name) for name in names if hasattr(torch, name)]
    return [
        grid,
        grid.T,
        grid[1:4, ::3],
        grid[2],
        torch.tensor([7], dtype=torch.int32).expand(5, 4),
        torch.tensor(3.5),
        torch.tensor([True, False, True]),
        torch.empty(0, 3),
        torch.empty(0, dtype=torch.int16),
        noise,
        *(noise[64 * n : 64 * n + 48].clone().view(dtype) for n, dtype in enumerate(dtypes)),
    ]


def _save_settings() -> Any:
    """The settings of torch.save; None: this torch has no alignment among them, as torch before 2.7."""
    try:
        from torch.utils.serialization import config
    except ModuleNotFoundError:
        return None
    return config.save if hasattr(config.save, "storage_alignment") else None


def padded_record(tensor: torch.Tensor) -> bytes:
    save = _save_settings()
    if save is None:
        return record_of(tensor)
    usual, save.storage_alignment = save.storage_alignment, 4096
    try:
        return record_of(tensor)
    finally:
        save.storage_alignment = usual


def record_without_checksums(tensor: torch.Tensor) -> bytes:
    if not hasattr(torch.serialization, "set_crc32_options"):  # before torch 2.6
        return record_of(tensor)
    torch.serialization.set_crc32_options(False)
    try:
        return record_of(tensor)
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.fixture(scope="session")
def geometries() -> frozenset[Geometry]:
    return frozenset(map(geometry_of, tensors()))


@pytest.fixture(scope="session")
def payloads() -> frozenset[bytes]:
    return frozenset(map(payload_of, tensors()))


@pytest.fixture(scope="session")
def checked_records(mutants: Mutants) -> st.SearchStrategy[Mutant]:
    """Damaged records of tensors; all of them had checksums."""
    return mutants([*map(record_of, tensors()), *map(padded_record, tensors()[:2])])


@pytest.fixture(scope="session")
def records(mutants: Mutants) -> st.SearchStrategy[Mutant]:
    """Damaged records of all that ``torch.save`` writes."""
    others: list[object] = [
        {"a": torch.ones(2), "b": [torch.zeros(3), "text"]},
        "text",
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
    ]
    return mutants(
        [
            *map(record_of, (*tensors(), *others)),
            *map(record_without_checksums, tensors()),
            *(record_of(value, _use_new_zipfile_serialization=False) for value in (torch.arange(5), others[0])),
        ]
    )


def copy_of(item: Item, layout: TensorLayout, *, verify: bool) -> torch.Tensor | None:
    """The tensor, or None where it was refused; into a target as large as the reader would have it."""
    count = max(math.prod(layout.size), *layout.size, 0)
    target = torch.empty(layout.size if count <= MOST_ELEMENTS else (3, 5), dtype=layout.dtype)
    try:
        copy_into(item, layout, target, verify=verify)
    except RecordCorrupted:
        return None
    except PlanError:
        assert count > MOST_ELEMENTS, "the target had the shape that the record names"
        return None
    return target


def decoded(item: Item) -> TensorLayout | None:
    try:
        layout = decode_layout(item)
    except RecordCorrupted:
        return None
    if layout is not None:
        assert 0 <= layout.payload_offset <= layout.payload_offset + layout.payload_nbytes <= item.size
    return layout


@fuzzed
@given(data=st.data(), piece_bytes=st.integers(1, 8192))
def test_record_with_checksums_gives_what_was_saved_or_an_error(
    data: st.DataObject,
    piece_bytes: int,
    checked_records: st.SearchStrategy[Mutant],
    geometries: frozenset[Geometry],
    payloads: frozenset[bytes],
) -> None:
    # A splice may join the head of one record and the bytes of another: each has its own CRC, and nothing joins them.
    record = data.draw(checked_records).data
    item = Item(record, piece_bytes)
    layout = decoded(item)
    tensor = copy_of(item, layout, verify=True) if layout is not None else None
    if layout is None or tensor is None:
        return
    assert layout.has_crc
    assert (*layout[:4], layout.payload_nbytes) in geometries
    payload = record[layout.payload_offset :][: layout.payload_nbytes]
    assert payload in payloads
    storage = torch.frombuffer(bytearray(payload), dtype=layout.dtype) if payload else torch.empty(0).to(layout.dtype)
    expected = storage.as_strided(layout.size, layout.stride, layout.storage_offset)
    assert bits(tensor) == bits(expected)


@fuzzed
@given(data=st.data(), piece_bytes=st.integers(1, 8192), verify=st.booleans())
def test_record_of_anything_gives_a_tensor_or_an_error(
    data: st.DataObject, piece_bytes: int, verify: bool, records: st.SearchStrategy[Mutant]
) -> None:
    item = Item(data.draw(records).data, piece_bytes)
    layout = decoded(item)
    if layout is not None:
        copy_of(item, layout, verify=verify)


@fuzzed
@given(data=st.data())
def test_record_that_is_left_to_torch_is_loaded_or_refused(
    data: st.DataObject, records: st.SearchStrategy[Mutant]
) -> None:
    item = Item(data.draw(records).data, 8192)
    try:
        load_whole(item)
    except (RecordCorrupted, pickle.UnpicklingError):
        return
