"""Load: tensors of safetensors files, received straight into their memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from mpreader.collector import collector_paused
from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, PlanError
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.safetensors.fill import fill
from mpreader.safetensors.modules import assign, targets_of
from mpreader.safetensors.sharing import Host, fill_shared, taking_part
from mpreader.safetensors.wanted import Slices, WantedTensor, check_names, choose, loaded, want_new, want_targets

__all__ = ["load_checkpoint", "load_file"]

StateOrModule = Mapping[str, torch.Tensor] | torch.nn.Module


def load_file(
    uri: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
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
        device: Where the tensors are wanted.
        dtype: Type that tensors of float64, float32, float16 and bfloat16 are converted to. Others are left as they
            are: the values of quantized tensors mean nothing without their scales.
        names: Names of the tensors that are wanted; None: all, or those of ``out``.
        slices: Index expressions by name, such as ``numpy.s_[:, 256:512]`` or ``slice(0, 10)``; or a function that is
            called with name and shape, and returns one. None: the whole tensor. Little more than the bytes of a slice
            is received.
        out: Tensors to fill, of the shapes that are loaded, of any type and device; or a module, whose parameters and
            persistent buffers are filled. What is on ``meta`` is made on ``device``: a module gets it in its place,
            for a dictionary it is in the result. Of a DTensor the part of this rank is loaded.
        headers: Headers for a web server, such as ``{"Authorization": "Bearer …"}``; they are sent to the server that
            ``uri`` names only, not where it redirects to.
        share_host: The ranks of a job that run on one host receive together what they want, each byte once; from
            ``s3://`` only. True: they find each other by a collective of torch.distributed, so that all ranks of the
            group must make this call, those that want nothing (``names=[]``), too. A text: they meet by this name,
            which they alone know, and need no process group. Who does not come within a minute, reads by itself.
        process_group: Group of the ranks; None: the default one.
        host_ranks: Number of ranks of this host that meet by a name. None: what the launcher (torchrun, Slurm, MPI, …)
            has told.
        progress: Progress bar on stderr. None: on a terminal or in a notebook, if it takes long. False: never.
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.

    Returns:
        The tensors by their names, in the order of their bytes. Elements of four and six bits are packed: see
        ``mpreader.safetensors``.

    Raises:
        HeaderRefused: The header is damaged, or contradicts the length of the file.
        PlanError: A tensor is not there, has another shape than its target, or a type that this torch does not know.
        ConfigError: Arguments contradict each other, or are of a wrong type.
        ObjectMissing: There is no such file.
        ObjectChanged: It was overwritten meanwhile.
        TransportError: The bytes could not be received.
    """
    uri = path_of(uri)
    host = _host_of(uri, share_host, process_group, host_ranks)
    with taking_part(host):
        options = _Options(device, dtype, names, slices, out, progress, host, s3client_config, pool_config)
        with fetcher_of(uri, s3client_config, pool_config, headers, for_host=options.leads_host) as fetcher:
            return options.load(fetcher, [uri])


def load_checkpoint(
    uri: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
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

    The arguments and errors are those of :func:`load_file`; without any file the error is ``ObjectMissing``. A name
    that ends with ``.safetensors`` is that of a file. A web server can't list a directory: there must be an index, or
    one file ``model.safetensors``. Of files that have none of ``names``, according to the index, nothing is read.
    """
    uri = path_of(uri)
    host = _host_of(uri, share_host, process_group, host_ranks)
    with taking_part(host):
        options = _Options(device, dtype, names, slices, out, progress, host, s3client_config, pool_config)
        with fetcher_of(uri, s3client_config, pool_config, headers, for_host=options.leads_host) as fetcher:
            return options.load(fetcher, files_of(fetcher, uri, names))


def _host_of(uri: str, share_host: bool | str, process_group: Any, host_ranks: int | None) -> Host | None:
    """Return the ranks that load together; None if there is only this one."""
    if not share_host:
        if process_group is not None or host_ranks is not None:
            raise ConfigError("process_group and host_ranks are for ranks that share: write share_host=True, or a name")
        return None
    if not uri.startswith("s3://"):
        raise ConfigError(f"ranks share what they load from s3:// only, and {uri!r} is elsewhere: leave share_host out")
    host = Host(share_host, process_group, host_ranks)
    return host if host.has_others else None


class _Options:
    """Arguments of a load, checked as far as that is possible without the headers of the files."""

    def __init__(
        self,
        device: str | torch.device,
        dtype: torch.dtype | None,
        names: Collection[str] | None,
        slices: Slices | None,
        out: StateOrModule | None,
        progress: bool | None,
        host: Host | None,
        s3client_config: S3ClientConfig | None,
        pool_config: PoolConfig | None,
    ) -> None:
        check_names(names)
        if dtype is not None and out is not None:
            raise ConfigError("the tensors of out have their types: leave dtype out")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"dtype is a torch.dtype, got {dtype!r}")
        self._device = device
        self._dtype = dtype
        self._names = names
        self._slices = slices
        self._out = out
        self._progress = progress
        self._host = host
        self._s3client_config = s3client_config
        self._pool_config = pool_config

    @property
    def leads_host(self) -> bool:
        """True if this rank is likely to receive for all ranks of its host."""
        return self._host is not None and self._host.is_likely_led_by_this

    def load(self, fetcher: FileFetcher, uris: Sequence[str]) -> dict[str, torch.Tensor]:
        """Load the tensors from these files."""
        with opened(fetcher, uris) as files:
            self._check_slices(files)
            if self._out is not None:
                return self._load_into(self._out, fetcher, files)
            with collector_paused():  # this makes several objects for each tensor, and no garbage
                wanted = list(want_new(choose(files, self._names), self._slices, self._device, self._dtype))
            self._fill(fetcher, files, wanted)
            return {one.stored.name: loaded(one) for one in wanted}

    def _load_into(
        self, out: StateOrModule, fetcher: FileFetcher, files: Sequence[StoredFile]
    ) -> dict[str, torch.Tensor]:
        stored = {name for file in files for name in file.header.tensors}
        targets = targets_of(out, stored, self._names, self._device)
        chosen = choose(files, targets.tensors)
        self._fill(fetcher, files, list(want_targets(chosen, self._slices, targets.tensors)))
        return assign(out, targets)

    def _fill(self, fetcher: FileFetcher, files: Sequence[StoredFile], wanted: list[WantedTensor]) -> None:
        if self._host is None:
            fill(fetcher, wanted, progress=self._progress)
            return
        fill_shared(
            *(self._host, files, wanted),
            progress=self._progress,
            s3client_config=self._s3client_config,
            pool_config=self._pool_config,
        )

    def _check_slices(self, files: Sequence[StoredFile]) -> None:
        if isinstance(self._slices, Mapping):
            unknown: Any = sorted(set(self._slices).difference(*(file.header.tensors for file in files)))
            if unknown:
                raise PlanError(f"slices has {unknown[0]!r}, but no such tensor is in the files")
