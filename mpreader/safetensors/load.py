"""Load: tensors of safetensors files, received straight into their memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import torch

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.formats.safetensors import StoredTensor
from mpreader.safetensors.files import StoredFile, files_of, opened

__all__ = ["TORCH_DTYPES", "load_checkpoint", "load_file"]

_NAMES: Final = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
TORCH_DTYPES: Final[Mapping[str, torch.dtype]] = {
    name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)
}
"""torch's types by their names in a header; those that this torch has."""


def load_file(
    uri: str,
    *,
    device: str | torch.device = "cpu",
    names: Collection[str] | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of one file.

    Args:
        uri: ``s3://bucket/key`` or an http(s) URL of a ``.safetensors`` file.
        device: Where the tensors are wanted.
        names: Names of the tensors that are wanted; None: all.
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Returns:
        The tensors by their names, in the order of their bytes.

    Raises:
        HeaderRefused: The header is damaged, or contradicts the length of the file.
        PlanError: A tensor is not there, or has a type that this torch does not know.
        TransportError: The bytes could not be received.
    """
    with SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return _load(fetcher, [uri], device, names)


def load_checkpoint(
    uri: str,
    *,
    device: str | torch.device = "cpu",
    names: Collection[str] | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of a directory of files, with or without ``model.safetensors.index.json``, or of one file.

    The arguments and errors are those of :func:`load_file`; without any file the error is ``ObjectMissing``.
    """
    with SharedPoolFetcher(s3client_config, pool_config) as fetcher:
        return _load(fetcher, files_of(fetcher, uri), device, names)


def _load(
    fetcher: RangeFetcher, uris: list[str], device: str | torch.device, names: Collection[str] | None
) -> dict[str, torch.Tensor]:
    wanted = None if names is None else set(names)
    with opened(fetcher, uris) as files:
        _check_wanted(files, wanted)
        tensors: dict[str, torch.Tensor] = {}
        ranges: dict[str, list[tuple[int, int]]] = {}
        targets: dict[str, list[Any]] = {}
        for file, stored in _chosen(files, wanted):
            tensor = tensors[stored.name] = torch.empty(torch_shape(stored), dtype=torch_dtype(stored))
            if stored.end > stored.start:
                ranges.setdefault(file.source, []).append((stored.start, stored.end))
                targets.setdefault(file.source, []).append(tensor.reshape(-1).view(torch.uint8).numpy())
        if ranges:
            fetcher.fetch_many(ranges, out=targets)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _chosen(files: list[StoredFile], wanted: set[str] | None) -> Iterator[tuple[StoredFile, StoredTensor]]:
    for file in files:
        for stored in file.header.tensors.values():
            if wanted is None or stored.name in wanted:
                yield file, stored


def _check_wanted(files: list[StoredFile], wanted: set[str] | None) -> None:
    missing = (wanted or set()).difference(*(file.header.tensors for file in files))
    if missing:
        raise PlanError(f"no tensor {min(missing)!r} is in {files[0].uri}" + (" or the other files" * (len(files) > 1)))


def torch_dtype(stored: StoredTensor) -> torch.dtype:
    """Return the type of a tensor.

    Raises:
        PlanError: This torch has no such type.
    """
    if stored.dtype not in TORCH_DTYPES:
        raise PlanError(f"tensor {stored.name!r} has the type {stored.dtype}, which torch {torch.__version__} has not")
    return TORCH_DTYPES[stored.dtype]


def torch_shape(stored: StoredTensor) -> tuple[int, ...]:
    """Return the shape that torch gives a tensor: two elements of four bits are one of torch's.

    Raises:
        PlanError: The last dimension is odd.
    """
    if stored.dtype != "F4":
        return stored.shape
    if not stored.shape or stored.shape[-1] % 2:
        raise PlanError(f"tensor {stored.name!r} of F4 has the shape {stored.shape}: its last dimension must be even")
    return (*stored.shape[:-1], stored.shape[-1] // 2)
