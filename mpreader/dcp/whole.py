"""Loads a whole checkpoint, or what patterns select of it, without knowing what it holds."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import allocate, check_memory, empty_state, nest, read_into, read_metadata, state_bytes
from mpreader.errors import PlanError
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.readers.kinds import S3ReaderConstructor

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["ItemRefused", "load_checkpoint", "load_through"]


class ItemRefused(PlanError):
    """An item that is no tensor can't be loaded without running what its author wrote."""


def load_checkpoint(
    uri: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    verify: bool = True,
    weights_only: bool = True,
    allowed_globals: Iterable[str] = (),
    progress: bool | None = None,
) -> dict[str, Any]:
    """Load a checkpoint into memory, without knowing its contents.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        region: The bucket's region. None: the configuration's, or the environment's.
        s3client_config: How S3 is reached.
        pool_config: Settings of the worker pool.
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one.
        match: Load only what has a name that this pattern, or one of these, matches: ``"model.*"``, with ``*``, ``?``
            and ``[…]`` as in file names, dots being nothing special. None: everything.
        verify: Whether the CRC-32s that ``torch.save`` wrote are checked.
        weights_only: Whether items that are no tensors are unpickled as by ``torch.load(weights_only=True)``, which
            makes plain types only. False runs code that the checkpoint's author chose.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may make besides DCP's own.
        progress: Whether a progress bar is shown on stderr. None: on a terminal or in a notebook.

    Returns:
        The state, nested as it was saved, its tensors in the memory of the CPU. Of a list of which only some was
        loaded, the rest is None.

    Raises:
        PlanError: Nothing matches, or there is less free memory than it takes.
        ItemRefused: An item needs a class that ``weights_only`` does not allow.
        MetadataRefused: ``.metadata`` is damaged, or names a class or a place that it may not.
        ChecksumMismatch: Bytes don't match their CRC-32, also when received again.
        TransportError: Bytes can't be had.
    """
    constructor = S3ReaderConstructor.multiprocess(max_gap_size, pool_config=pool_config, progress=progress)
    reader = S3StorageReader(region, uri, s3client_config, constructor, verify=verify, allowed_globals=allowed_globals)
    with reader:
        return load_through(reader, pool_config, match, weights_only=weights_only)[0]


def load_through(
    reader: S3StorageReader,
    pool_config: PoolConfig | None,
    match: str | Iterable[str] | None,
    *,
    weights_only: bool,
    check: Callable[[Mapping[str, Any]], object] | None = None,
) -> tuple[dict[str, Any], int]:
    """Load with a reader that the caller has made, as :func:`load_checkpoint` does.

    Args:
        reader: Reads the checkpoint.
        pool_config: Settings of its pool.
        match: Patterns that select what is loaded.
        weights_only: Whether items that are no tensors must be of plain types.
        check: May refuse to load a state, which has no memory yet, by an exception. None: it is loaded if memory
            suffices.

    Returns:
        The state, and the bytes of its tensors.
    """
    reader.reset()
    metadata = read_metadata(reader)
    planned = empty_state(metadata, match)
    check_memory(planned, reader, pool_config)
    if check is not None:
        check(planned)
    state = allocate(planned)
    read_into(reader, metadata, state, _safe_item if weights_only else _any_item)
    return nest(state, metadata), state_bytes(planned)


def _safe_item(fqn: str, stored: io.BytesIO) -> Any:
    try:
        return torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has several types for what it refuses
        raise ItemRefused(
            f"{fqn!r} is no tensor, and can't be loaded as plain types{_unsafe_globals(stored)}; nothing of it was "
            "run. If you trust whoever wrote the checkpoint: weights_only=False (--trust)"
        ) from error


def _unsafe_globals(stored: io.BytesIO) -> str:
    name_them: Any = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # since torch 2.6
    if name_them is None:
        return ""
    stored.seek(0)
    try:
        names = name_them(stored)
    except Exception:  # noqa: BLE001  # only to say more; it may be no archive
        return ""
    return f": it needs {', '.join(names)}" if names else ""


def _any_item(fqn: str, stored: io.BytesIO) -> Any:  # noqa: ARG001  # a LoadItem
    return torch.load(stored, map_location="cpu", weights_only=False)
