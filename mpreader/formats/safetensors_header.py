"""Encoder of the header of a safetensors file; it also decides the order of the tensors. It must work without torch.

The converter writes files with it; :mod:`mpreader.formats.safetensors` reads what it makes. The bytes are those that
the safetensors library (0.8) writes for the same tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from mpreader.config import GiB
from mpreader.errors import PlanError
from mpreader.formats.safetensors import BITS, LENGTH_BYTES, MAX_HEADER_BYTES, StoredTensor

__all__ = ["DEFAULT_MAX_SHARD_SIZE", "EncodedHeader", "TensorSpec", "encode_header"]

DEFAULT_MAX_SHARD_SIZE: Final = 5 * GiB
"""Largest number of bytes of the tensors in one file of several, unless the user chooses another one."""

_METADATA: Final = "__metadata__"
_ALIGNMENT: Final = 8  # of the first tensor
# Types of large elements come first, so that each tensor is aligned for its type. Types of the same size are in the
# order of the library, so that the bytes are the same.
_RANKS: Final = {dtype: rank for rank, dtype in enumerate(["BOOL", *(name for name in BITS if name != "BOOL")])}


class TensorSpec(NamedTuple):
    """Description of a tensor that is to be stored.

    Attributes:
        name: Its name.
        dtype: Name of the type of its elements, a key of :data:`~mpreader.formats.safetensors.BITS`.
        shape: Its shape, in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes that it takes in a file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class EncodedHeader(NamedTuple):
    """Beginning of a file, and the places of its tensors.

    Attributes:
        data: The length and the header: all bytes of the file before the first tensor.
        tensors: The tensors in the order of their bytes.
    """

    data: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def file_nbytes(self) -> int:
        """Length of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.data)


def encode_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> EncodedHeader:
    """Encode the header of a file.

    Args:
        tensors: The tensors, in any order.
        metadata: Strings to add, by name.

    Raises:
        PlanError: No file can hold these tensors: two have the same name, a name can't be written, or the header would
            be longer than readers take.
    """
    ordered = sorted(tensors, key=lambda spec: (-_RANKS[spec.dtype], spec.name))
    _check_names(ordered)
    described: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    ends = [0]
    for spec in ordered:
        ends.append(ends[-1] + spec.nbytes)
        described[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": ends[-2:]}
    text = _encoded(described)
    base = LENGTH_BYTES + len(text)
    stored = [
        StoredTensor(spec.name, spec.dtype, spec.shape, base + start, base + end)
        for spec, start, end in zip(ordered, ends, ends[1:], strict=False)
    ]
    return EncodedHeader(len(text).to_bytes(LENGTH_BYTES, "little") + text, tuple(stored))


def _encoded(described: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"a name can't be written in UTF-8: {error.object!r:.200}") from error
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise PlanError(f"the header would have {len(text)} bytes, more than {MAX_HEADER_BYTES}: make smaller shards")
    return text


def _check_names(ordered: Sequence[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in ordered:
        if spec.name == _METADATA or spec.name in seen:
            reason = "is there twice" if spec.name in seen else "can't be the name of a tensor in a safetensors file"
            raise PlanError(f"{spec.name!r} {reason}")
        seen.add(spec.name)
