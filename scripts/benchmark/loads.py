"""Contenders of loads: storage readers for ``torch.distributed.checkpoint.load``, and the task that loads with them.

measure.py runs the task for the workloads a to d and big.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from checkpoints import BUCKET, TINY, Checkpoint, checkpoint_of
from isal import isal_zlib
from separate import import_s3fs
from targets import Targets
from tasks import Job, WrongBytes
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

__all__ = ["LoadTask", "reader_maker", "warm_up"]

_REGION = "us-east-1"
ReaderMaker = Callable[[], Any]


class LoadTask:
    """Loads a checkpoint, each time with a new reader object, as a program does that loads two checkpoints."""

    def __init__(self, job: Job) -> None:
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._checkpoint = Checkpoint(job.data / BUCKET / checkpoint_of(job.workload))
        self._targets = Targets(
            self._checkpoint.shapes_for(job.workload), fresh=job.fresh, shared=job.workload == "big"
        )
        self.cuts = 0
        self._make_reader = reader_maker(job.contender, f"s3://{BUCKET}/{self._checkpoint.folder.name}", job)

    @property
    def target_ranges(self) -> list[tuple[int, int]]:
        return self._targets.ranges

    def prepare(self) -> None:
        self._targets.renew()

    def run(self) -> None:
        reader = self._make_reader()
        load(dict(self._targets.tensors), storage_reader=reader, no_dist=True)
        if hasattr(reader, "stats"):  # mpreader's
            self.cuts = reader.stats.slow_cut

    def check(self) -> None:
        for name, tensor in self._targets.tensors.items():
            if isal_zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy()) != self._checkpoint.crcs[name]:
                raise WrongBytes(name)

    def close(self) -> None:
        pass


def reader_maker(contender: str, uri: str, job: Job) -> ReaderMaker:
    """Import what a contender needs, which is not timed; returns a function that makes its readers, which is."""
    makers = {"mpreader": _mpreader, "alone": _alone, "drop-in": _drop_in, "local": _local, "s3fs": _s3fs}
    if contender in makers:
        return makers[contender](uri, job)
    return _connector(uri, contender)


def _mpreader(uri: str, _: Job) -> ReaderMaker:
    from mpreader import S3ClientConfig
    from mpreader.dcp import S3StorageReader

    config = S3ClientConfig(force_path_style=True)
    return lambda: S3StorageReader(_REGION, uri, config)


def _alone(uri: str, _: Job) -> ReaderMaker:
    from mpreader import S3ClientConfig
    from mpreader.dcp import S3StorageReader

    config = S3ClientConfig(force_path_style=True)
    return lambda: S3StorageReader(_REGION, uri, config, share_host=False)


def _drop_in(uri: str, _: Job) -> ReaderMaker:
    from s3torchconnector.dcp import S3StorageReader

    from mpreader import S3ReaderConstructor

    return lambda: S3StorageReader(_REGION, uri, reader_constructor=S3ReaderConstructor.multiprocess())


def _connector(uri: str, kind: str) -> ReaderMaker:
    from s3torchconnector import S3ClientConfig, S3ReaderConstructor
    from s3torchconnector.dcp import S3StorageReader

    make_constructor = getattr(S3ReaderConstructor, kind)
    config = S3ClientConfig(force_path_style=True)
    return lambda: S3StorageReader(_REGION, uri, config, reader_constructor=make_constructor())


def _local(_: str, job: Job) -> ReaderMaker:
    folder = job.data / BUCKET / checkpoint_of(job.workload)
    return lambda: FileSystemReader(folder)


def _s3fs(uri: str, job: Job) -> ReaderMaker:
    import_s3fs()  # fsspec would import it by name in the first load
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return lambda: FsspecReader(uri, client_kwargs={"endpoint_url": job.site.endpoint_url})


def warm_up(job: Job) -> None:
    """Load a tiny local checkpoint: torch does some work once, in its first load, which no contender should pay for."""
    folder = job.data / BUCKET / TINY
    load({"tensor": torch.zeros(1000, dtype=torch.bfloat16)}, storage_reader=FileSystemReader(folder), no_dist=True)
