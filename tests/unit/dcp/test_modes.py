"""Copies of stored tensors do not depend on torch's modes, such as a default device that holds no bytes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mpreader.dcp.sample import differing, make_state
from mpreader.dcp.state import allocate
from mpreader.dcp.tensor import copy_into, load_whole
from mpreader.formats.torch_save import BufferItem, decode_layout
from tests.unit.dcp.test_tensor import DTYPES, bits, record_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real discards"),
    pytest.mark.filterwarnings("ignore:.*quantiz"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse"),
]


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills its memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "with device": lambda: torch.device("meta"),
    "default device": default_device,
    "default dtype": default_dtype,
    "filled memory": filled_memory,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return MODES[request.param]


def layouts() -> dict[str, torch.Tensor]:
    numbers = torch.arange(6 * 4 * 5 * 7, dtype=torch.float32).reshape(6, 4, 5, 7)
    return {
        "contiguous": numbers,
        "transposed": numbers.reshape(24, 35).t(),
        "channels last": numbers.contiguous(memory_format=torch.channels_last),
        "strided": numbers.reshape(-1)[::3],
        "offset": numbers[2:, 1:],
        "expanded": torch.arange(5.0)[:, None].expand(5, 9),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "large rows": torch.arange(300_000, dtype=torch.float32).reshape(2, 150_000),
    }


def targets_of(value: torch.Tensor) -> dict[str, torch.Tensor]:
    size = value.shape
    spread = torch.zeros(*size[:-1], 2 * size[-1]) if value.dim() else torch.zeros(2)
    targets = {
        "plain": torch.zeros(size),
        "transposed": torch.zeros(size[::-1]).permute(tuple(range(len(size)))[::-1]),
        "strided": spread[..., ::2] if value.dim() else spread[1],
        "float64": torch.zeros(size, dtype=torch.float64),
        "conjugated": torch.zeros(size, dtype=torch.complex64).conj(),
    }
    if value.dim() == 4:
        targets["channels last"] = torch.zeros(size).contiguous(memory_format=torch.channels_last)
    return targets


def copied(record: bytes, target: torch.Tensor) -> None:
    item = BufferItem(bytearray(record))
    layout = decode_layout(item)
    assert layout is not None
    copy_into(item, layout, target)


@pytest.mark.parametrize("layout", layouts())
def test_copy_in_a_mode_fills_targets_of_every_layout(layout: str, mode: Callable[[], Any]) -> None:
    value = layouts()[layout]
    record = record_of(value)
    for name, target in targets_of(value).items():
        with mode():
            copied(record, target)
        assert torch.equal(target, value.to(target.dtype)), name


def one_or_error(call: Callable[[], object]) -> type[Exception] | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001  # whatever torch says to a pair that it can't convert
        return type(error)
    return None


def test_copy_in_a_mode_converts_between_all_element_types(mode: Callable[[], Any]) -> None:
    for stored_type in DTYPES:
        value = (torch.arange(24) % 2 + 1).to(stored_type).reshape(4, 6)
        record = record_of(value)
        for wanted_type in DTYPES:
            target, expected = torch.zeros(4, 6, dtype=wanted_type), torch.zeros(4, 6, dtype=wanted_type)
            refused = one_or_error(lambda: expected.copy_(value))  # noqa: B023
            with mode():
                assert one_or_error(lambda: copied(record, target)) is refused, (stored_type, wanted_type)  # noqa: B023
            assert bits(target) == bits(expected), (stored_type, wanted_type)


# Tensors whose records are left to torch.load.
WHOLE_TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "parameter": lambda: torch.nn.Parameter(torch.arange(12.0)),
    "conjugated": lambda: torch.complex(torch.arange(4.0), torch.ones(4)).conj(),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "sparse rows": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 1, torch.qint8),
}


@pytest.mark.parametrize("kind", WHOLE_TENSORS)
@pytest.mark.parametrize("legacy", [False, True])
def test_record_of_another_kind_is_loaded_onto_the_cpu_in_a_mode(
    kind: str, legacy: bool, mode: Callable[[], Any]
) -> None:
    value, stream = WHOLE_TENSORS[kind](), io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not legacy)
    with mode():
        loaded, _ = load_whole(BufferItem(bytearray(stream.getvalue())))
    assert loaded.device.type == "cpu"
    assert loaded.dtype == value.dtype
    with torch.inference_mode():  # torch refuses to densify an inference tensor elsewhere
        dense, expected = (each.dequantize() if each.is_quantized else each.to_dense() for each in (loaded, value))
        assert torch.equal(dense.resolve_conj(), expected.resolve_conj())


def test_sample_state_is_the_same_in_a_mode(mode: Callable[[], Any]) -> None:
    with mode():
        made = make_state(1)
    assert differing(make_state(1), made) == []


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such type")
def test_type_that_torch_can_not_fill_is_loaded_in_a_mode(mode: Callable[[], Any]) -> None:
    value = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    record = record_of(value)
    planned = {"weight": torch.empty(8, dtype=torch.float4_e2m1fn_x2, device="meta"), "step": None}
    with mode():
        loaded, made = load_whole(BufferItem(bytearray(record)))[0], allocate(planned)["weight"]
    assert bits(loaded) == bits(value)
    assert (made.dtype, made.shape, made.device.type) == (value.dtype, value.shape, "cpu")
    setting: Any = torch.utils.deterministic
    assert setting.fill_uninitialized_memory
