"""Load: tensors of safetensors files, received straight into their memory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from mpreader.collector import collector_paused
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, PlanError
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.safetensors.fill import fill
from mpreader.safetensors.sharing import Host, fill_shared, host_of, taking_part
from mpreader.safetensors.state import assign, targets_of
from mpreader.safetensors.wanted import Slices, WantedTensor, check_names, choose, loaded, want_new, want_targets

__all__ = ["load_checkpoint", "load_file"]

StateOrModule = Mapping[str, torch.Tensor] | torch.nn.Module


def load_file(
    uri: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    names: Collection[str] | None = None,
    slices: Slices | None = None,
    out: StateOrModule | None = None,
    headers: Mapping[str, str] | None = None,
    share_host: bool | str = False,
    process_group: Any = None,
    host_ranks: int | None = None,
    progress: bool | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of one file.

    Args:
        uri: ``s3://bucket/key``, an http(s) URL, or a local path.
        device: Device of the tensors that are made.
        dtype: Type that tensors of float64, float32, float16 and bfloat16 are converted to; all others stay as they
            are, since the values of quantized tensors mean nothing without their scales. None: no tensor is
            converted. Not allowed with ``out``, whose tensors have their types.
        names: Names of the tensors that are wanted. None: all of the file, or those of ``out``.
        slices: Index expressions by name, such as ``numpy.s_[:, 256:512]`` or ``slice(0, 10)``; a name that is not in
            it gets the whole tensor. Or a function that is called with name and shape and returns an index expression,
            or None for the whole tensor. Little more than the bytes of a slice is received.
        out: State dictionary of tensors to fill, of the shapes that are loaded, of any type and device; or a module,
            whose parameters and persistent buffers are filled. In place of a tensor on ``meta`` a new one is made on
            ``device``: a module then has the new one, a dictionary is left as it is and the new one is in the result.
            Of a DTensor, this rank's part is loaded.
        headers: HTTP headers for a web server, such as ``{"Authorization": "Bearer …"}``. They are sent only to the
            server that ``uri`` names, not to one that it redirects to.
        share_host: The ranks of a job that run on one host receive together what they want, each byte once; from
            ``s3://`` only. False: each rank loads by itself. True: they find each other by a collective of
            torch.distributed, so that all ranks of the group must make this call, even those that want nothing
            (``names=[]``). A string: they meet under this name, which no other job on the host may use, and need no
            process group. A rank that has not come within a minute loads by itself.
        process_group: Process group of the ranks, for ``share_host=True``. None: the default one.
        host_ranks: Number of ranks of this host that meet under a name. None: the number that the launcher (torchrun,
            Slurm, MPI, …) has set.
        progress: True shows a progress bar on stderr, False shows none. None: on a terminal or in a notebook.
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Returns:
        The tensors by their names, in the order of their bytes in the file; with ``out`` in no particular order, and a
        tensor that ``out`` has under several names under each of them. Elements of four and six bits are packed: see
        ``mpreader.safetensors``.

    Raises:
        HeaderRefused: The header is damaged, or contradicts the length of the file.
        PlanError: A tensor is missing from the file, has another shape than its target, or has a type that this version
            of torch lacks; or an index expression does not fit its tensor.
        ConfigError: Arguments contradict each other, or are of a wrong type.
        ObjectMissing: There is no such file.
        ObjectChanged: The file was overwritten during the load.
        TransportError: The bytes could not be received.
        PoolError: The worker pool has failed.
        ArenaError: Shared memory is used up.
    """
    uri = path_of(uri)
    with taking_part(host_of(uri, share_host, process_group, host_ranks)) as host:
        request = _Request(
            uri=uri,
            device=device,
            dtype=dtype,
            names=names,
            slices=slices,
            out=out,
            headers=headers,
            host=host,
            progress=progress,
            s3client_config=s3client_config,
            pool_config=pool_config,
        )
        return request.load(lambda _, uri: [uri])


def load_checkpoint(
    uri: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    names: Collection[str] | None = None,
    slices: Slices | None = None,
    out: StateOrModule | None = None,
    headers: Mapping[str, str] | None = None,
    share_host: bool | str = False,
    process_group: Any = None,
    host_ranks: int | None = None,
    progress: bool | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> dict[str, torch.Tensor]:
    """Load the tensors of a directory of files, with or without ``model.safetensors.index.json``, or of one file.

    A ``uri`` that ends with ``.safetensors`` names a file. A web server can't list a directory: there must be an index,
    or one file ``model.safetensors``. Files that have none of ``names``, according to the index, are not read. All
    other arguments are those of :func:`load_file`, and so are the errors.

    Raises:
        ObjectMissing: There is no safetensors file in the directory, or the index names one that is missing.
        PlanError: As for :func:`load_file`; or the index is damaged, or two files have a tensor of the same name.
    """
    uri = path_of(uri)
    with taking_part(host_of(uri, share_host, process_group, host_ranks)) as host:
        request = _Request(
            uri=uri,
            device=device,
            dtype=dtype,
            names=names,
            slices=slices,
            out=out,
            headers=headers,
            host=host,
            progress=progress,
            s3client_config=s3client_config,
            pool_config=pool_config,
        )
        return request.load(lambda fetcher, uri: files_of(fetcher, uri, names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """Arguments of a load, as :func:`load_file` explains them, and the ranks that load together, if there are others.

    Raises:
        ConfigError: Arguments contradict each other, as far as that shows without the headers of the files.
    """

    uri: str
    device: str | torch.device
    dtype: torch.dtype | None
    names: Collection[str] | None
    slices: Slices | None
    out: StateOrModule | None
    headers: Mapping[str, str] | None
    host: Host | None
    progress: bool | None
    s3client_config: S3ClientConfig | None
    pool_config: PoolConfig | None

    def __post_init__(self) -> None:
        check_names(self.names)
        if self.dtype is not None and self.out is not None:
            raise ConfigError("the tensors of out have their types: leave dtype out")
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ConfigError(f"dtype is a torch.dtype, got {self.dtype!r}")

    def load(self, find_files: Callable[[FileFetcher, str], Sequence[str]]) -> dict[str, torch.Tensor]:
        """Load the tensors from the files whose URIs ``find_files`` returns, for the fetcher and the URI."""
        for_host = self.host is not None and self.host.is_likely_leader
        with (
            fetcher_of(self.uri, self.s3client_config, self.pool_config, self.headers, for_host=for_host) as fetcher,
            opened(fetcher, find_files(fetcher, self.uri)) as files,
        ):
            self._check_slices(files)
            if self.out is not None:
                return self._load_into(self.out, fetcher, files)
            with collector_paused():  # this makes several objects for each tensor, and no garbage
                wanted = list(want_new(choose(files, self.names), self.slices, self.device, self.dtype))
            self._fill(fetcher, files, wanted)
            return {one.stored.name: loaded(one) for one in wanted}

    def _load_into(
        self, out: StateOrModule, fetcher: FileFetcher, files: Sequence[StoredFile]
    ) -> dict[str, torch.Tensor]:
        stored = {name for file in files for name in file.header.tensors}
        targets = targets_of(out, stored, self.names, self.device)
        chosen = choose(files, targets.tensors)
        self._fill(fetcher, files, list(want_targets(chosen, self.slices, targets.tensors)))
        return assign(out, targets)

    def _fill(self, fetcher: FileFetcher, files: Sequence[StoredFile], wanted: list[WantedTensor]) -> None:
        if self.host is None:
            fill(fetcher, wanted, progress=self.progress)
            return
        fill_shared(
            self.host,
            files,
            wanted,
            progress=self.progress,
            s3client_config=self.s3client_config,
            pool_config=self.pool_config,
        )

    def _check_slices(self, files: Sequence[StoredFile]) -> None:
        if isinstance(self.slices, Mapping):
            unknown: Any = sorted(set(self.slices).difference(*(file.header.tensors for file in files)))
            if unknown:
                raise PlanError(f"slices has {unknown[0]!r}, but no such tensor is in the files")
