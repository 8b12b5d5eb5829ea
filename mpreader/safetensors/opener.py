"""Opened files: headers are read once, tensors and slices of them when they are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

import torch

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, PoolClosed, TransportError
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.formats.safetensors import StoredTensor
from mpreader.formats.torch_tensors import TORCH_DTYPES
from mpreader.safetensors.fill import fill, filled
from mpreader.safetensors.wanted import WantedTensor, choose, loaded, want_new
from mpreader.sources.uri import without_secrets

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TensorSlice", "safe_open"]

_FRAMEWORKS: Final = ("pt", "torch", "pytorch")


class safe_open:  # noqa: N801  # the name that it has in the safetensors package
    """Open a file, or a directory of files, to load tensors and slices of it one by one. A context manager.

    It takes the place of the class of this name in the safetensors package. Only what is asked for is received; but if
    tensors are asked for one after the other, in the order of their bytes, the next ones are read ahead, as far as
    shared memory allows. All reads are of the versions that the files had when they were opened; an overwritten file is
    an error. Not thread-safe.

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
        self._is_closed = False
        if framework not in _FRAMEWORKS:
            raise ConfigError(f'framework is "pt" (torch), got {framework!r}')
        self._device = device
        self._pid = os.getpid()
        self._uri = uri = path_of(uri)
        self._next_place = -1  # that of the tensor behind the last one that was loaded; see _places
        self._ahead: Generator[WantedTensor, None, None] | None = None  # what is read ahead from there on
        with contextlib.ExitStack() as stack:
            self._fetcher: FileFetcher = fetcher_of(uri, s3client_config, pool_config, headers)
            stack.callback(self._fetcher.close)
            self._files: Sequence[StoredFile] = stack.enter_context(opened(self._fetcher, files_of(self._fetcher, uri)))
            self._tensors = choose(self._files, None)
            self._places = {stored.name: place for place, (_, stored) in enumerate(self._tensors)}
            self._stack = stack.pop_all()

    def keys(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._places)

    def offset_keys(self) -> list[str]:
        """Return the names of all tensors, in the order of the files and of their bytes."""
        return list(self._places)

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
            PoolClosed: The file was closed.
            ObjectChanged: The file was overwritten since it was opened.
            TransportError: The bytes could not be received.
            PoolError: The worker pool has failed.
            ArenaError: Shared memory is used up.
        """
        place = self._place_of(name)
        if os.getpid() != self._pid:  # what was begun before a fork can't go on behind it
            self._pid = os.getpid()
            self._end_ahead()
        if place != self._next_place:
            self._end_ahead()
        elif self._ahead is None:
            self._ahead = self._read_ahead(place)
        try:
            wanted = None if self._ahead is None else next(self._ahead, None)
        except BaseException:
            self._end_ahead()
            raise
        self._next_place = place + 1
        return self._load(name, ...) if wanted is None else loaded(wanted)

    def get_slice(self, name: str) -> TensorSlice:
        """Return a handle of a tensor, by which parts of it are loaded. Receives nothing.

        Raises:
            PlanError: There is no tensor of this name.
        """
        return TensorSlice(self, self._tensors[self._place_of(name)][1])

    def close(self) -> None:
        """Leave the worker pool; nothing can be loaded afterwards. Idempotent."""
        self._is_closed = True
        self._end_ahead()
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an opened file can't be pickled: open it where it is needed")

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            with contextlib.suppress(TransportError):  # a local file has changed; here nobody can be told
                self.close()

    def _place_of(self, name: str) -> int:
        if self._is_closed:
            raise PoolClosed(f"{without_secrets(self._uri)} was closed; open it again")
        if name not in self._places:
            choose(self._files, [name])  # raises
        return self._places[name]

    def _load(self, name: str, index: Any) -> torch.Tensor:
        (wanted,) = want_new([self._tensors[self._place_of(name)]], {name: index}, self._device, None)
        fill(self._fetcher, [wanted], progress=False)
        return loaded(wanted)

    def _read_ahead(self, place: int) -> Generator[WantedTensor, None, None]:
        """Begin to read the tensors from a place on, as far as this version of torch has their types."""
        following = list(takewhile(lambda one: one[1].dtype in TORCH_DTYPES, self._tensors[place:]))
        planned = list(want_new(following, None, "meta", None))  # without memory, until it is their turn
        # Without a reference to this object: the two would be a cycle, and a file that is dropped would be read on.
        return filled(self._fetcher, planned, make=partial(_with_memory, self._device))

    def _end_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()


def _with_memory(device: str | torch.device, planned: WantedTensor) -> WantedTensor:
    (wanted,) = want_new([(planned.file, planned.stored)], None, device, None)
    return wanted


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
