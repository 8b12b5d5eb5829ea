"""Reader of the pickle in a ``torch.save`` record: finds the layout of the tensor that it describes.

:mod:`mpreader.formats.torch_save` uses it. The pickle is not trusted: a layout is returned only if every number in it
was checked, so that the code that copies the tensor need not check them again.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from mpreader.formats.layout import TensorLayout
from mpreader.formats.opcodes import Call, Global, Persistent, read_opcodes

__all__ = ["read_layout"]

# Element type of each typed storage. torch pickles a tensor of one of these types by _rebuild_tensor_v2.
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
# Element types without a typed storage. torch pickles their tensors by _rebuild_tensor_v3, with an untyped storage, and
# with the type as the last argument. Older versions of torch lack some of them.
_NAMED_DTYPES: Final = {
    Global(f"torch {name}"): getattr(torch, name)
    for name in (
        *("uint16", "uint32", "uint64", "complex32", "bcomplex32", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
}
_REBUILD_V2: Final = Global("torch._utils _rebuild_tensor_v2")
_REBUILD_V3: Final = Global("torch._utils _rebuild_tensor_v3")
_UNTYPED: Final = Global("torch.storage UntypedStorage")
_NO_HOOKS: Final = Call(Global("collections OrderedDict"), ())  # the empty dictionary of backward hooks


def read_layout(data: bytes, payload_name: str, payload_offset: int, *, has_crc: bool) -> TensorLayout | None:
    """Read the layout of a tensor; returns None if the pickle is of anything but one plain CPU tensor in one storage.

    Args:
        data: The whole pickle, the content of the entry ``data.pkl``.
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
    # A call with more arguments, such as the metadata of a tensor, is left to torch.load.
    if tree.function == _REBUILD_V2 and len(tree.arguments) == 6:
        storage, storage_offset, size, stride, requires_grad, hooks = tree.arguments
        dtype = None
    elif tree.function == _REBUILD_V3 and len(tree.arguments) == 7:
        storage, storage_offset, size, stride, requires_grad, hooks, dtype = tree.arguments
    else:
        return None
    # A tensor that requires grad or has hooks is more than its bytes: it is left to torch.load.
    if requires_grad is not False or hooks != _NO_HOOKS or not isinstance(storage, Persistent):
        return None
    read = _read_storage(storage.id, dtype, payload_name)
    if read is None:
        return None
    layout = TensorLayout(read[0], size, stride, storage_offset, payload_offset, read[1], has_crc)
    return layout if _is_inside(layout) else None


def _read_storage(fields: Any, dtype_name: Any, payload_name: str) -> tuple[torch.dtype, int] | None:
    """Read the reference to a storage.

    Args:
        fields: Identity of the storage, as the pickle gives it: a tuple of five nodes if the pickle is honest.
        dtype_name: Node of the element type that is named beside the storage; None if there is none.
        payload_name: Name of the archive's entry that holds the storage.

    Returns:
        The element type, and the bytes of the storage; None if it is not a storage of the CPU in that entry.
    """
    if not isinstance(fields, tuple) or len(fields) != 5:
        return None
    tag, storage_type, key, device, count = fields
    if (tag, device) != ("storage", "cpu") or not isinstance(key, str) or payload_name != f"data/{key}":
        return None
    if not isinstance(storage_type, Global) or not _is_count(count):
        return None
    # An untyped storage counts bytes and the dtype is named beside it (_rebuild_tensor_v3); a typed one counts elements
    # and gives the dtype itself (_rebuild_tensor_v2). A mixture of the two is not what torch writes.
    if storage_type == _UNTYPED and isinstance(dtype_name, Global):
        dtype = _NAMED_DTYPES.get(dtype_name)
        return (dtype, count) if dtype is not None else None
    dtype = _STORAGE_DTYPES.get(storage_type)
    return (dtype, count * dtype.itemsize) if dtype is not None and dtype_name is None else None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62  # torch keeps it in 64 bits; bool is an int, so the exact type


def _is_inside(layout: TensorLayout) -> bool:
    """Returns True if shape and strides are well-formed and every element lies in the payload."""
    size, stride = layout.size, layout.stride
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        return False
    if not all(map(_is_count, (*size, *stride, layout.storage_offset))):
        return False
    if math.prod(size) == 0:
        return True  # there is no last element to be outside
    last = layout.storage_offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    return (last + 1) * layout.dtype.itemsize <= layout.payload_nbytes
