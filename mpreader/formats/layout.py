"""Layout of a stored tensor: the place of its elements in the bytes of an item.

The decoders of the formats make layouts, and whoever plans or copies the bytes of a tensor uses them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["TensorLayout"]


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
