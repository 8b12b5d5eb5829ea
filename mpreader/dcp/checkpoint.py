"""Loader of whole checkpoints, or of selected items, for users who have no state dictionary with the right tensors.

:func:`load_checkpoint` is public; the converter uses :func:`load_state`, and the commands ``load`` and ``bench`` use
:class:`LoadOptions`. Items that are no tensors were pickled by the author of the checkpoint. They are unpickled here;
this module must not run code that the author chose, unless the user says so by ``weights_only=False``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from mpreader.dcp.huggingface import S3HuggingFaceStorageReader
from mpreader.dcp.loader import check_memory, read_into, read_metadata
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import allocate, empty_state, nest, state_bytes
from mpreader.errors import PlanError
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.readers.kinds import S3ReaderConstructor

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["ItemRefused", "LoadOptions", "load_checkpoint", "load_state"]


class ItemRefused(PlanError):
    """An item that is no tensor can't be loaded without running code that the checkpoint's author chose."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of a load: the keyword arguments of :func:`load_checkpoint`, or of the reader, which explain them.

    With ``safetensors`` the checkpoint is one of safetensors files: ``max_gap_size``, ``verify``, ``weights_only`` and
    ``allowed_globals`` are of no effect then.
    """

    region: str | None
    s3client_config: S3ClientConfig | None
    pool_config: PoolConfig | None
    max_gap_size: float
    match: str | Iterable[str] | None
    verify: bool | Literal["whole"]
    weights_only: bool
    allowed_globals: Iterable[str]
    progress: bool | None
    share_host: bool = True
    safetensors: bool = False

    def open_reader(self, uri: str | os.PathLike[str]) -> S3StorageReader:
        """Make a storage reader of the checkpoint; the caller closes it."""
        if self.safetensors:
            return S3HuggingFaceStorageReader(
                self.region,
                uri,
                self.s3client_config,
                pool_config=self.pool_config,
                progress=self.progress,
                share_host=self.share_host,
            )
        constructor = S3ReaderConstructor.multiprocess(
            self.max_gap_size, pool_config=self.pool_config, progress=self.progress
        )
        return S3StorageReader(
            self.region,
            uri,
            self.s3client_config,
            constructor,
            verify=self.verify,
            allowed_globals=self.allowed_globals,
            share_host=self.share_host,
        )

    def open_plain_reader(self, uri: str | os.PathLike[str]) -> S3StorageReader:
        """Make a storage reader for what describes the items only; for ``.metadata`` it starts no processes."""
        if self.safetensors:
            return self.open_reader(uri)
        plain = S3ReaderConstructor.sequential()
        return S3StorageReader(self.region, uri, self.s3client_config, plain, allowed_globals=self.allowed_globals)


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
    """Load a checkpoint into memory; its contents need not be known.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        region: The bucket's region. None: the configuration's, or the environment's.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        max_gap_size: Largest gap, in bytes, between two items that are fetched together, with the gap.
        match: One pattern or several; an item is loaded if one of them matches its name. In ``"model.*"``, as in
            patterns of file names, ``*``, ``?`` and ``[…]`` are special, and ``*`` matches dots, too. None: everything.
        verify: True checks the CRC-32s that ``torch.save`` wrote.
        weights_only: True unpickles items that are no tensors as ``torch.load(weights_only=True)`` does, which makes
            plain types only. False runs code that the checkpoint's author chose.
        allowed_globals: Classes, such as ``"package.module.Name"``, that ``.metadata`` may use besides DCP's own.
        progress: True shows a progress bar on stderr, False shows none. None: on a terminal or in a notebook.

    Returns:
        The state, nested as it was saved, with its tensors in the memory of the CPU. Elements of a list that were not
        loaded are None if a later element was loaded.

    Raises:
        PlanError: Nothing matches, or the tensors need more memory than is free.
        ItemRefused: An item needs a class that ``weights_only`` does not allow.
        MetadataRefused: ``.metadata`` is damaged, or needs a class or names a path that is not allowed.
        ChecksumMismatch: Bytes don't match their CRC-32, also when received again.
        TransportError: Bytes could not be received.
    """
    options = LoadOptions(
        region, s3client_config, pool_config, max_gap_size, match, verify, weights_only, allowed_globals, progress
    )
    return load_state(uri, options)[0]


def load_state(
    uri: str | os.PathLike[str],
    options: LoadOptions,
    *,
    check: Callable[[Mapping[str, Any]], object] | None = None,
) -> tuple[dict[str, Any], int]:
    """Load a checkpoint as :func:`load_checkpoint` does.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        options: The options of the load.
        check: Called with the planned state, before memory is allocated or tensors are requested; it may raise an
            exception to refuse the load.

    Returns:
        The state, nested as it was saved, and the number of bytes of its tensors.
    """
    with options.open_reader(uri) as reader:
        metadata = read_metadata(reader)
        planned = empty_state(metadata, options.match)
        check_memory(state_bytes(planned), reader, options.pool_config)
        if check is not None:
            check(planned)
        state = allocate(planned)  # after all checks, so that a refused load has taken no memory
        read_into(reader, metadata, state, _safe_item if options.weights_only else _any_item)
    return nest(state, metadata), state_bytes(planned)


def _safe_item(fqn: str, stored: io.BytesIO) -> Any:
    """Unpickle an item as plain types.

    Raises:
        ItemRefused: The item needs a class that torch does not allow.
    """
    try:
        with torch.device("cpu"):  # as in _any_item
            return torch.load(stored, map_location="cpu", weights_only=True)
    except Exception as error:  # torch refuses items by errors of several types
        raise ItemRefused(
            f"{fqn!r} is no tensor, and can't be loaded as plain types{_unsafe_globals(stored)}; nothing of it was "
            "run. If you trust whoever wrote the checkpoint: weights_only=False (--trust)"
        ) from error


def _unsafe_globals(stored: io.BytesIO) -> str:
    """Returns the names of the refused classes, for the text of an error; "" if torch can't find them."""
    find_names: Any = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)  # since torch 2.6
    if find_names is None:
        return ""
    stored.seek(0)  # torch.load has read from it
    try:
        names = find_names(stored)
    # An item that is no archive, say. The names only make an error clearer, so no failure here may replace that error.
    except Exception:  # noqa: BLE001
        return ""
    return f": it needs {', '.join(names)}" if names else ""


def _any_item(fqn: str, stored: io.BytesIO) -> Any:  # noqa: ARG001  # LoadItem gives the name to every such function
    """Unpickle an item of any classes; runs code that the checkpoint's author chose."""
    # torch.load makes some kinds of tensors on the default device, whatever map_location says, and the user may have
    # set one that holds no bytes, such as "meta".
    with torch.device("cpu"):
        return torch.load(stored, map_location="cpu", weights_only=False)
