"""Shards: the safetensors files that the tensors of a checkpoint are divided among, and the batches that write a file.

The converter to safetensors uses it. It must not read or write anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import torch

from mpreader.errors import ConfigError, PlanError
from mpreader.formats.safetensors import packed_shape
from mpreader.formats.safetensors_header import EncodedHeader, TensorSpec, encode_header
from mpreader.formats.torch_tensors import DTYPE_NAMES, TORCH_DTYPES
from mpreader.safetensors.conversion.pieces import BATCH_BYTES, Piece, batches_of, pieces_of
from mpreader.safetensors.wanted import converted

__all__ = ["Batch", "ShardFile", "batches_of_files", "dtype_of", "shard_files", "specs_of"]

_METADATA: Final = {"format": "pt"}  # transformers refuses files that don't say so
_MOST_LISTED: Final = 10


class ShardFile(NamedTuple):
    """Safetensors file that is to be written.

    Attributes:
        name: Its name in the target.
        header: Its header.
    """

    name: str
    header: EncodedHeader


class Batch(NamedTuple):
    """Pieces that follow each other in a file.

    Attributes:
        file: The file.
        start: First byte in the file.
        end: End of the bytes, exclusive.
        pieces: The pieces, and the first byte of each in the file.
    """

    file: ShardFile
    start: int
    end: int
    pieces: Sequence[tuple[Piece, int]]


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the type that tensors are to be converted to, from the type or its name.

    Raises:
        ConfigError: It is not a floating point type, or can't be stored.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or DTYPE_NAMES.get(found, "F4") == "F4":
        raise ConfigError(f"dtype is a floating point type that safetensors files can hold, got {dtype!r}")
    return found


def specs_of(
    items: Mapping[str, torch.Tensor | None], dtype: torch.dtype | None, *, skip_other: bool
) -> tuple[list[TensorSpec], tuple[str, ...]]:
    """Return descriptions of the tensors, and the names of the other items.

    Args:
        items: Tensors on the meta device by name; None for an item that is not a tensor.
        dtype: Type that tensors of the usual floating point types are converted to. None: they are kept.
        skip_other: True: items that are not tensors are allowed.

    Raises:
        PlanError: A safetensors file can't hold an item, or there is no tensor.
    """
    other = tuple(name for name, item in items.items() if item is None)
    if other and not skip_other:
        raise PlanError(
            f"safetensors files hold tensors only, and these items are none: {_listed(other)}; leave them out by "
            "skip_other=True (--skip-other), or select others (match=, --match)"
        )
    tensors = {name: item for name, item in items.items() if item is not None}
    unknown = [f"{name!r} ({tensor.dtype})" for name, tensor in tensors.items() if not _is_storable(tensor)]
    if unknown:
        raise PlanError(
            f"safetensors files can't hold the types of {_listed(unknown)}; select others (match=, --match)"
        )
    if not tensors:
        raise PlanError("there is no tensor to convert")
    return [_spec(name, tensor, dtype) for name, tensor in tensors.items()], other


def _is_storable(tensor: torch.Tensor) -> bool:
    # Of packed elements a file counts two for one of torch; a shape without dimensions can't say that.
    return (
        tensor.layout == torch.strided
        and tensor.dtype in DTYPE_NAMES
        and (DTYPE_NAMES[tensor.dtype] != "F4" or tensor.ndim > 0)
    )


def _spec(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> TensorSpec:
    is_packed = DTYPE_NAMES[tensor.dtype] == "F4"  # two elements of the file are one of torch
    shape = (*tensor.shape[:-1], tensor.shape[-1] * 2) if is_packed else tuple(tensor.shape)
    return TensorSpec(name, DTYPE_NAMES[converted(tensor.dtype, dtype)], shape)


def shard_files(specs: Sequence[TensorSpec], file_name: str | None, max_bytes: int) -> list[ShardFile]:
    """Divide tensors among files, in their order.

    Args:
        specs: The tensors.
        file_name: Name of the one file. None: as many as are needed, named as transformers does.
        max_bytes: Largest number of bytes of the tensors in a file that has several.
    """
    shards: list[list[TensorSpec]] = [[]]
    nbytes = 0
    for spec in specs:
        if file_name is None and shards[-1] and nbytes + spec.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(spec)
        nbytes += spec.nbytes
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [file_name or "model.safetensors"]
    return [ShardFile(name, encode_header(shard, _METADATA)) for name, shard in zip(names, shards, strict=True)]


def batches_of_files(files: Iterable[ShardFile], rows_of: Callable[[str], int]) -> Iterator[Batch]:
    """Yield the batches that write files, one after the other.

    Args:
        files: The files.
        rows_of: Returns, for the name of a tensor, how many of its rows are stored together: their checksum can be
            compared only if all of them are loaded at once.
    """
    for file in files:
        position = len(file.header.data)
        for pieces in batches_of(_pieces(file, rows_of), max_bytes=BATCH_BYTES):
            ends = [*itertools.accumulate((piece.nbytes for piece in pieces), initial=position)]
            yield Batch(file, position, ends[-1], list(zip(pieces, ends[:-1], strict=True)))
            position = ends[-1]


def _pieces(file: ShardFile, rows_of: Callable[[str], int]) -> Iterator[Piece]:
    for stored in file.header.tensors:
        dtype = TORCH_DTYPES[stored.dtype]
        rows = rows_of(stored.name)
        yield from pieces_of(stored.name, packed_shape(stored), dtype.itemsize, max_bytes=BATCH_BYTES, rows=rows)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
