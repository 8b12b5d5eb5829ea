"""Types and layouts that torch gives the tensors of safetensors files.

Elements smaller than a byte are packed. Two of ``F4`` are one element of torch, so that the last dimension is half as
long. torch has no type for ``F6``: its bytes are returned as they are, as ``uint8``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch

from mpreader.errors import PlanError
from mpreader.formats.layout import TensorLayout
from mpreader.formats.safetensors import StoredTensor, packed_shape

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "layout_of", "torch_dtype"]

_TORCH_NAMES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
    "F6_E2M3": "uint8", "F6_E3M2": "uint8",
}  # fmt: skip
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, own) for name, own in _TORCH_NAMES.items() if hasattr(torch, own)
}
"""torch's types by their names in a header; those that this torch has."""

DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    dtype: name for name, dtype in TORCH_DTYPES.items() if not name.startswith("F6_")
}
"""Names in a header by torch's types; torch's other types can't be stored."""


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the type of a tensor.

    Raises:
        PlanError: This torch has no such type.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise PlanError(
            f"tensor {stored.name!r} has the type {stored.dtype}: torch {torch.__version__} has no "
            f"torch.{_TORCH_NAMES[stored.dtype]}, a newer torch has"
        )
    return TORCH_DTYPES[stored.dtype]


def layout_of(stored: StoredTensor) -> TensorLayout:
    """Return the layout of a tensor in its bytes of the file.

    Raises:
        PlanError: This torch has no such type.
    """
    size = packed_shape(stored)
    stride = tuple(math.prod(size[dim + 1 :]) for dim in range(len(size)))
    return TensorLayout(torch_dtype(stored), size, stride, 0, 0, stored.end - stored.start, has_crc=False)
