from __future__ import annotations

import io
import struct
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._shard._utils import narrow_tensor_by_index

from mpreader.dcp import tensor as tensor_module
from mpreader.dcp.tensor import copy_into
from mpreader.errors import PlanError
from mpreader.formats.torch_save import BufferItem, RecordCorrupted, decode_layout

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def _can_be_saved(dtype: torch.dtype) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # complex32 is experimental
            torch.save(torch.empty(0, dtype=dtype), io.BytesIO())
    except KeyError:  # torch 2.4 saves no unsigned integers but those of 8 bits
        return False
    return True


DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex128", "complex64", "complex32", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name) and _can_be_saved(getattr(torch, name))
]


def record_of(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def filled(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits: NaNs and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool().reshape(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).tolist())


@st.composite
def stored_tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    tensor = filled(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    for change in draw(st.lists(st.sampled_from(["permute", "step", "narrow", "expand"]), max_size=2)):
        if change == "permute":
            tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
        elif change == "expand" and tensor.dim() < 4:
            tensor = tensor.expand(draw(st.integers(1, 3)), *tensor.shape)
        elif tensor.dim() and change == "step":
            tensor = tensor[:: draw(st.integers(1, 3))]
        elif tensor.dim() and change == "narrow":
            dim = draw(st.integers(0, tensor.dim() - 1))
            start = draw(st.integers(0, tensor.shape[dim]))
            tensor = tensor.narrow(dim, start, draw(st.integers(0, tensor.shape[dim] - start)))
    return tensor


def make_target(shape: torch.Size, dtype: torch.dtype, kind: str) -> torch.Tensor:
    if kind == "contiguous":
        return torch.zeros(shape, dtype=dtype)
    if kind == "transposed":
        return torch.zeros(shape[::-1], dtype=dtype).permute(list(range(len(shape)))[::-1])
    if kind == "strided":
        return torch.zeros((*shape, 2), dtype=dtype)[..., 1]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.zeros(shape, dtype=wide)


@given(
    data=st.data(),
    tensor=stored_tensors(),
    kind=st.sampled_from(["contiguous", "transposed", "strided", "converted"]),
    cuts=st.lists(st.integers(0, 2**16), max_size=8),
    verify=st.booleans(),
)
def test_copy_gives_what_torch_load_and_narrow_give(
    cut_item: Any, data: st.DataObject, tensor: torch.Tensor, kind: str, cuts: list[int], verify: bool
) -> None:
    record = record_of(tensor)
    offsets = [data.draw(st.integers(0, length)) for length in tensor.shape]
    lengths = [data.draw(st.integers(0, length - offset)) for length, offset in zip(tensor.shape, offsets, strict=True)]
    loaded = torch.load(io.BytesIO(record), weights_only=True)
    expected = narrow_tensor_by_index(loaded, offsets, lengths)
    target = make_target(expected.shape, tensor.dtype, kind)
    item = cut_item(record, cuts)
    layout = decode_layout(item)
    assert layout is not None
    copy_into(item, layout, target, offsets, lengths, verify=verify)
    assert bits(target) == bits(expected.to(target.dtype))


@given(data=st.data(), tensor=stored_tensors(), kind=st.sampled_from(["contiguous", "strided", "converted"]))
def test_copy_refuses_every_flipped_byte_of_the_payload(
    cut_item: Any, data: st.DataObject, tensor: torch.Tensor, kind: str
) -> None:
    record = bytearray(record_of(tensor))
    layout = decode_layout(BufferItem(record))
    assert layout is not None
    if not layout.payload_nbytes:
        return
    record[layout.payload_offset + data.draw(st.integers(0, layout.payload_nbytes - 1))] ^= 0x10
    target = make_target(tensor.shape, tensor.dtype, kind)
    with pytest.raises(RecordCorrupted, match="CRC-32"):
        copy_into(cut_item(bytes(record)), layout, target)


class LentItem:
    """A record in pieces of 1000 bytes; asserts that the last piece is gone when the next one is asked for."""

    def __init__(self, record: bytes) -> None:
        self._record = record
        self._lent: weakref.ref[Any] = weakref.ref(set())
        self.size = len(record)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        for at in range(start, end, 1000):
            yield self._lend(at, min(at + 1000, end))
            assert self._lent() is None

    def _lend(self, start: int, end: int) -> memoryview:
        memory: Any = np.frombuffer(bytearray(self._record[start:end]), np.uint8)
        self._lent = weakref.ref(memory)
        return memoryview(memory)

    def view(self, start: int, end: int) -> memoryview:
        return memoryview(bytearray(self._record[start:end]))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "converted"])
def test_copy_of_a_box_lets_go_of_each_piece_before_the_next_one(kind: str, verify: bool) -> None:
    tensor = filled([40, 300], torch.float32, 1).nan_to_num()
    item = LentItem(record_of(tensor))
    layout = decode_layout(item)
    assert layout is not None
    target = make_target(torch.Size((20, 300)), torch.float32, kind)
    copy_into(item, layout, target, (10, 0), (20, 300), verify=verify)
    assert torch.equal(target, tensor[10:30].to(target.dtype))


@pytest.mark.parametrize(
    ("offsets", "lengths"), [((0, 0), (3, 600_000)), ((1, 100), (2, 599_000)), ((0, 599_999), (3, 1)), ((2, 0), (1, 7))]
)
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "converted"])
def test_copy_of_rows_longer_than_a_block(
    cut_item: Any, offsets: tuple[int, int], lengths: tuple[int, int], kind: str
) -> None:
    tensor = torch.arange(1_800_000, dtype=torch.int32).reshape(3, 600_000)
    item = cut_item(record_of(tensor), [1_000_001, 2_500_002, 2_500_003, 7_000_000])
    layout = decode_layout(item)
    assert layout is not None
    target = make_target(torch.Size(lengths), torch.int32, kind)
    copy_into(item, layout, target, offsets, lengths)
    assert torch.equal(target, narrow_tensor_by_index(tensor, offsets, lengths).to(target.dtype))


def test_copy_of_a_box_of_long_rows_goes_straight_into_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = filled([3, 400_000], torch.int32, 1)
    item = BufferItem(bytearray(record_of(stored)))
    layout = decode_layout(item)
    assert layout is not None
    target = torch.zeros(2, 100_000, dtype=torch.int32)
    monkeypatch.setattr(tensor_module._Payload, "gather", None)  # what would copy the bytes once more
    copy_into(item, layout, target, (1, 5), (2, 100_000))
    assert torch.equal(target, stored[1:, 5:100_005])


def test_copy_verifies_a_record_of_more_than_4_gib_by_its_longer_descriptor() -> None:
    record = bytearray(record_of(torch.arange(6.0)))
    layout = decode_layout(BufferItem(record))
    assert layout is not None
    end = layout.payload_offset + layout.payload_nbytes
    signature, crc, nbytes, _ = struct.unpack_from("<4sIII", record, end)
    record[end : end + 16] = struct.pack("<4sIQQ", signature, crc, nbytes, nbytes)
    target = torch.zeros(6)
    copy_into(BufferItem(record), layout, target)
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
    record[end - 1] ^= 1
    with pytest.raises(RecordCorrupted, match="CRC-32"):
        copy_into(BufferItem(record), layout, target)


def test_copy_reads_the_item_in_ascending_order_once(cut_item: Any) -> None:
    """A large item's parts are given back as the reading moves on."""

    class Watched(cut_item):  # type: ignore[misc]
        reached = 0

        def pieces(self, start: int, end: int) -> Any:
            assert start >= self.reached
            Watched.reached = end
            return super().pieces(start, end)

        def view(self, start: int, end: int) -> memoryview:
            assert start >= self.reached
            return memoryview(bytearray(b"".join(cut_item.pieces(self, start, end))))

    tensor = torch.arange(1_800_000, dtype=torch.int32).reshape(3, 600_000)
    item = Watched(record_of(tensor), [1_000_001])
    layout = decode_layout(item)
    assert layout is not None
    copy_into(item, layout, torch.zeros(2, 7, dtype=torch.int64), (1, 5), (2, 7))
    assert Watched.reached == layout.payload_offset + layout.payload_nbytes


def test_copy_into_a_tensor_subclass_goes_through_the_subclass() -> None:
    class Counting(torch.Tensor):
        copies = 0

        def copy_(self, *args: Any, **kwargs: Any) -> Any:
            Counting.copies += 1
            return super().copy_(*args, **kwargs)

    item = BufferItem(bytearray(record_of(torch.arange(6.0))))
    layout = decode_layout(item)
    assert layout is not None
    target = torch.zeros(6).as_subclass(Counting)
    copy_into(item, layout, target)
    assert Counting.copies == 1
    assert torch.equal(target.as_subclass(torch.Tensor), torch.arange(6.0))


def test_copy_into_a_conjugated_target_conjugates() -> None:
    item = BufferItem(bytearray(record_of(torch.tensor([1 + 2j, 3 - 4j]))))
    layout = decode_layout(item)
    assert layout is not None
    target = torch.zeros(2, dtype=torch.complex64).conj()
    copy_into(item, layout, target)
    assert target.tolist() == [1 + 2j, 3 - 4j]


@pytest.mark.parametrize(
    ("offsets", "lengths", "shape"),
    [
        ((3,), (2,), (2, 3)),
        ((-1,), (2,), (2, 3)),
        ((0,), (-1,), (0, 3)),
        ((0, 0, 0), (1, 1, 1), (1, 1)),
        ((0,), (), (4, 3)),
        ((0,), (2,), (4, 3)),
    ],
)
def test_copy_refuses_a_box_or_target_that_does_not_fit(
    offsets: tuple[int, ...], lengths: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    item = BufferItem(bytearray(record_of(torch.zeros(4, 3))))
    layout = decode_layout(item)
    assert layout is not None
    with pytest.raises(PlanError, match=r"box|offsets"):
        copy_into(item, layout, torch.zeros(shape), offsets, lengths)
