"""Decoder of the header of a safetensors file. Everything in it is checked before it is returned.

A file is a length, a header in JSON, and the bytes of the tensors, one after the other::

    8 bytes    number of bytes of the header, little-endian
    header     {"__metadata__": {"name": "text", …}, "tensor": {"dtype": "F32", "shape": […], "data_offsets": […]}, …}
    data       all of it belongs to some tensor: there are no holes, and no byte belongs to two

Nothing is allocated here from the numbers of a header. The rules are those of the safetensors library (0.8), except for
two kinds of headers, which it accepts and this module refuses: those that have a name twice, of which the library takes
the last one, and those that describe a tensor by a list, or its type by an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, NoReturn

from mpreader.errors import PlanError

__all__ = [
    "BITS",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "Header",
    "HeaderRefused",
    "StoredTensor",
    "decode_header",
    "header_end",
    "packed_shape",
]

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000  # the library's own bound
_MOST: Final = 2**64 - 1
_METADATA: Final = "__metadata__"
_FIELDS: Final = ("dtype", "shape", "data_offsets")
_MOST_DIGITS: Final = len(str(_MOST))
_MOST_NESTED: Final = 127  # lists and objects in one another: the library's own bound

BITS: Final[Mapping[str, int]] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of one element, by the name of its type."""


class HeaderRefused(PlanError):
    """The header of a safetensors file is damaged, or contradicts itself or the length of the file."""


class StoredTensor(NamedTuple):
    """Tensor of a file, as the header describes it.

    Attributes:
        name: Its name.
        dtype: Name of the type of its elements, a key of :data:`BITS`.
        shape: Its shape, in elements.
        start: First byte in the file.
        end: End of its bytes in the file, exclusive.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """Decoded header of a file.

    Attributes:
        tensors: The tensors by their names, in the order of their bytes.
        metadata: Strings that the writer has added, by name.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def packed_shape(stored: StoredTensor) -> tuple[int, ...]:
    """Return the shape of a tensor as torch has it.

    Where elements are smaller than a byte, the last dimension counts bytes; if rows don't end at a byte, the tensor has
    one dimension, which counts all of its bytes.
    """
    bits = BITS[stored.dtype]
    if bits >= 8:
        return stored.shape
    if stored.shape and not stored.shape[-1] * bits % 8:
        return (*stored.shape[:-1], stored.shape[-1] * bits // 8)
    return (stored.end - stored.start,)


def header_end(prefix: bytes, file_nbytes: int) -> int:
    """Return where the header of a file ends.

    Args:
        prefix: The first ``LENGTH_BYTES`` bytes of the file.
        file_nbytes: Length of the file.

    Raises:
        HeaderRefused: The file can't have such a header.
    """
    if len(prefix) < LENGTH_BYTES:
        raise HeaderRefused(f"a safetensors file begins with {LENGTH_BYTES} bytes, this one has {file_nbytes}")
    nbytes = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if nbytes > MAX_HEADER_BYTES:
        raise HeaderRefused(f"no safetensors file: its header would have {nbytes} bytes, more than {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + nbytes > file_nbytes:
        raise HeaderRefused(
            f"the header has {nbytes} bytes, but the file only {file_nbytes}: it was cut off, or is of another format"
        )
    return LENGTH_BYTES + nbytes


def decode_header(data: bytes | memoryview, file_nbytes: int) -> Header:
    """Decode and check a header.

    Args:
        data: The bytes behind the length, up to :func:`header_end`.
        file_nbytes: Length of the file.

    Raises:
        HeaderRefused: A rule of the format is broken.
    """
    described = _parse(bytes(data))
    metadata = _checked_metadata(described.pop(_METADATA, None))
    base = LENGTH_BYTES + len(data)
    tensors = [_checked_tensor(name, entry, base) for name, entry in described.items()]
    # Tensors without bytes come before one that begins at the same place.
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps another tensor" if tensor.start < end else f"leaves a hole of {tensor.start - end} bytes"
            _refuse(tensor.name, f"{kind} before byte {tensor.start} of the file")
        end = tensor.end
    if end != file_nbytes:
        raise HeaderRefused(f"the tensors end at byte {end}, but the file has {file_nbytes} bytes")
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
        described = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_fraction, parse_int=_natural
        )
    except HeaderRefused:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise HeaderRefused(f"the header is no JSON: {error}") from error
    if not isinstance(described, dict):
        raise HeaderRefused(f"the header is a {type(described).__name__}, not an object of JSON")
    return described


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    for text in (*made, *(value for value in made.values() if isinstance(value, str))):
        text.encode("utf-8")  # JSON can name half of a character, which no text in UTF-8 has: a ValueError
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise HeaderRefused(f"the header has {twice!r} twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _natural(text: str) -> int | float:
    """Return a number. What has a sign becomes a fraction, ``-0`` too: where numbers count, fractions are refused."""
    return _fraction(text) if text.startswith("-") or len(text) > _MOST_DIGITS else int(text)


def _fraction(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large for any type")
    return number


def _checked_metadata(stored: object) -> Mapping[str, str]:
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not all(isinstance(text, str) for text in stored.values()):
        raise HeaderRefused(f"{_METADATA} must be texts by name")
    return stored


def _checked_tensor(name: str, entry: object, base: int) -> StoredTensor:
    if not isinstance(entry, dict):
        _refuse(name, "is not described by an object of JSON")
    fields: list[Any] = [entry.get(field) for field in _FIELDS]
    if len(entry) > len(_FIELDS):
        _check_unused(name, [value for field, value in entry.items() if field not in _FIELDS])
    dtype, shape, offsets = fields
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(name, f"has the type {dtype!r}: it must be one of {', '.join(BITS)}")
    if not _are_sizes(shape):
        _refuse(name, f"has the shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        _refuse(name, f"has the data_offsets {offsets!r}")
    count = 1
    for size in shape:
        count *= size
        if count > _MOST:
            _refuse(name, f"has the shape {shape!r}, of more elements than can be counted")
    nbits = count * BITS[dtype]
    start, end = offsets
    if nbits % 8:
        _refuse(name, f"has {count} elements of {BITS[dtype]} bits, which don't end at a byte")
    if end - start != nbits // 8:
        _refuse(name, f"has {end - start} bytes, but {dtype} of shape {shape} takes {nbits // 8}")
    return StoredTensor(name, dtype, tuple(shape), base + start, base + end)


def _check_unused(name: str, values: list[Any]) -> None:
    """Check fields that nobody reads for what the library refuses there, too, and Python takes for JSON."""
    pending = [(value, 3) for value in values]  # with how many lists and objects are around it, and itself
    while pending:
        value, depth = pending.pop()
        if isinstance(value, (list, dict)):
            if depth > _MOST_NESTED:
                _refuse(name, f"has a field of more than {_MOST_NESTED} lists and objects in one another")
            pending.extend((inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))
        elif isinstance(value, str) and not _is_text(value):
            _refuse(name, "has a field with half of a character")


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= _MOST for size in value)


def _refuse(name: str, reason: str) -> NoReturn:
    raise HeaderRefused(f"tensor {name!r} {reason}")
