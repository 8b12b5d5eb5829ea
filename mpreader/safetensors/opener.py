"""Opened files: headers are read once, tensors and slices of them when they are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.formats.safetensors import StoredTensor
from mpreader.safetensors.fill import fill
from mpreader.safetensors.wanted import choose, loaded, want_new

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TensorSlice", "safe_open"]

_FRAMEWORKS: Final = ("pt", "torch", "pytorch")


class safe_open:  # noqa: N801  # the name that it has in the safetensors package
    """Open a file, or a directory of files, to load tensors and slices of it one by one. A context manager.

    It takes the place of the class of this name in the safetensors package. Only what is asked for is received, one
    tensor at a time: many tensors are loaded faster by :func:`~mpreader.safetensors.load_checkpoint` with ``names``.
    All reads are of the versions that the files had when they were opened; an overwritten file is an error.

    Args:
        uri: ``s3://bucket/key``, an http(s) URL or a local path; one that does not end with ``.safetensors`` names a
            directory.
        framework: ``"pt"``, tensors of torch: the only one that is supported.
        device: Device of the tensors.
        headers: HTTP headers for a web server; see :func:`~mpreader.safetensors.load_file`.
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Raises:
        HeaderRefused: A header is damaged, or contradicts the length of its file.
        PlanError: The index is damaged, or two files have a tensor of the same name.
        ObjectMissing: There is no such file.
        ConfigError: An argument is wrong.
        TransportError: A header could not be received.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        framework: str = "pt",
        device: str | torch.device = "cpu",
        *,
        headers: Mapping[str, str] | None = None,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
    ) -> None:
        if framework not in _FRAMEWORKS:
            raise ConfigError(f'framework is "pt" (torch), got {framework!r}')
        self._device = device
        uri = path_of(uri)
        with contextlib.ExitStack() as stack:
            self._fetcher: FileFetcher = fetcher_of(uri, s3client_config, pool_config, headers)
            stack.callback(self._fetcher.close)
            self._files: Sequence[StoredFile] = stack.enter_context(opened(self._fetcher, files_of(self._fetcher, uri)))
            self._stack = stack.pop_all()

    def keys(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(name for file in self._files for name in file.header.tensors)

    def offset_keys(self) -> list[str]:
        """Return the names of all tensors, in the order of the files and of their bytes."""
        return [name for file in self._files for name in file.header.tensors]

    def metadata(self) -> dict[str, str] | None:
        """Return the strings that the writers have added, by name, or None if there are none.

        Of a name that several files have, the last file's string is returned.
        """
        joined = {name: text for file in self._files for name, text in file.header.metadata.items()}
        return joined or None

    def get_tensor(self, name: str) -> torch.Tensor:
        """Load a tensor.

        Raises:
            PlanError: There is no tensor of this name, or this version of torch lacks its type.
            ObjectChanged: The file was overwritten since it was opened.
            TransportError: The bytes could not be received.
            PoolError: The worker pool has failed.
            ArenaError: Shared memory is used up.
        """
        return self._load(name, ...)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a handle of a tensor, by which parts of it are loaded. Receives nothing.

        Raises:
            PlanError: There is no tensor of this name.
        """
        ((_, stored),) = choose(self._files, [name])
        return TensorSlice(self, stored)

    def close(self) -> None:
        """Leave the worker pool; nothing can be loaded afterwards. Idempotent."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            self._stack.close()

    def _load(self, name: str, index: Any) -> torch.Tensor:
        (wanted,) = want_new(choose(self._files, [name]), {name: index}, self._device, None)
        fill(self._fetcher, [wanted], progress=False)
        return loaded(wanted)


class TensorSlice:
    """Handle of a tensor of an opened file: ``handle[…]`` loads a part of it, and receives little more than that part.

    Made by :meth:`safe_open.get_slice`. An index is made of integers, of slices with a positive step and of ``...``, as
    for a tensor of torch.
    """

    def __init__(self, opened: safe_open, stored: StoredTensor) -> None:
        self._opened = opened
        self._stored = stored

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor, in elements."""
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        """Return the name of its type in the header, such as ``"BF16"``."""
        return self._stored.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Load a part of the tensor; as in the safetensors package, an index can't add a dimension.

        Raises:
            PlanError: The index does not fit the tensor.
            MpreaderError: As for :meth:`safe_open.get_tensor`.
        """
        # A bare None would stand for the whole tensor; within a tuple it is refused.
        return self._opened._load(self._stored.name, (None,) if index is None else index)
