"""Layout of the tensor of a ``torch.save`` record, read from the pickle of the record.

:mod:`mpreader.dcp.record` uses it. Everything in the pickle is checked: a layout that is returned can be copied from
without another look at its numbers.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import torch

from mpreader.dcp.opcodes import Call, Global, Persistent, read_opcodes

__all__ = ["TensorLayout", "read_layout"]


class TensorLayout(NamedTuple):
    """Layout of a tensor in its record.

    Attributes:
        dtype: Element type.
        size: Shape.
        stride: Strides, in elements.
        storage_offset: First element within the payload, in elements.
        payload_offset: First byte of the payload (the whole storage) within the record.
        payload_nbytes: Bytes of the payload.
        has_crc: True if the record was saved with checksums.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    payload_offset: int
    payload_nbytes: int
    has_crc: bool


_STORAGE_DTYPES: Final = {
    Global(f"torch {name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
}
_NAMED_DTYPES: Final = {
    Global(f"torch {name}"): getattr(torch, name)
    for name in (
        *("uint16", "uint32", "uint64", "complex32", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
}
_REBUILD_V2: Final = Global("torch._utils _rebuild_tensor_v2")
_REBUILD_V3: Final = Global("torch._utils _rebuild_tensor_v3")
_UNTYPED: Final = Global("torch.storage UntypedStorage")
_NO_HOOKS: Final = Call(Global("collections OrderedDict"), ())


def read_layout(data: bytes, payload_name: str, payload_offset: int, *, has_crc: bool) -> TensorLayout | None:
    """Read a data.pkl; returns None if it describes anything but one plain CPU tensor in one storage.

    Args:
        data: The whole pickle.
        payload_name: Name of the archive's entry that holds the storage, such as ``data/0``.
        payload_offset: First byte of that entry's content in the record.
        has_crc: True if the record was saved with checksums.
    """
    try:
        tree = read_opcodes(data)
    except ValueError:
        return None
    if not isinstance(tree, Call) or not isinstance(tree.arguments, tuple):
        return None
    if tree.function == _REBUILD_V2 and len(tree.arguments) == 6:
        storage, storage_offset, size, stride, requires_grad, hooks = tree.arguments
        dtype = None
    elif tree.function == _REBUILD_V3 and len(tree.arguments) == 7:
        storage, storage_offset, size, stride, requires_grad, hooks, dtype = tree.arguments
    else:
        return None
    # A tensor with hooks, or one that requires grad, is more than its bytes.
    if requires_grad is not False or hooks != _NO_HOOKS or not isinstance(storage, Persistent):
        return None
    read = _read_storage(storage.id, dtype, payload_name)
    if read is None:
        return None
    layout = TensorLayout(read[0], size, stride, storage_offset, payload_offset, read[1], has_crc)
    return layout if _is_inside(layout) else None


def _read_storage(fields: Any, dtype_name: Any, payload_name: str) -> tuple[torch.dtype, int] | None:
    """Returns the element type, and the bytes of the storage."""
    if not isinstance(fields, tuple) or len(fields) != 5:
        return None
    tag, storage_type, key, device, count = fields
    if (tag, device) != ("storage", "cpu") or not isinstance(key, str) or payload_name != f"data/{key}":
        return None
    if not isinstance(storage_type, Global) or not _is_count(count):
        return None
    # The dtype is named beside an untyped storage (_rebuild_tensor_v3), or is that of the storage (_v2): never both.
    if storage_type == _UNTYPED and isinstance(dtype_name, Global):
        dtype = _NAMED_DTYPES.get(dtype_name)
        return (dtype, count) if dtype is not None else None
    dtype = _STORAGE_DTYPES.get(storage_type)
    return (dtype, count * dtype.itemsize) if dtype is not None and dtype_name is None else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # torch keeps it in 64 bits


def _is_inside(layout: TensorLayout) -> bool:
    """Returns True if the geometry is well-formed and every element of it lies in the payload."""
    size, stride = layout.size, layout.stride
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        return False
    if not all(map(_is_count, (*size, *stride, layout.storage_offset))):
        return False
    if math.prod(size) == 0:
        return True
    last = layout.storage_offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    return (last + 1) * layout.dtype.itemsize <= layout.payload_nbytes
