"""Load: tensors of safetensors files, received straight into their memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.safetensors import StoredFile, files_of, opened
from mpreader.formats.safetensors import StoredTensor
from mpreader.formats.torch_tensors import torch_dtype, torch_shape

__all__ = ["load_checkpoint", "load_file"]


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
