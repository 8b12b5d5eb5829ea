"""One rank of a tensor-parallel job that loads its rows of each tensor of safetensors files, with the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import torch
from checkpoints import BUCKET, Checkpoint, checkpoint_of
from rank import join, set_rank, take_turns
from tasks import Job
from tensors import check_tensors, quarter, runai_streamer

__all__ = ["RANKS", "TensorRankJob", "run_tensor_rank"]

RANKS: Final = 4
Load = Callable[[], dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class TensorRankJob:
    """What the ranks do.

    Attributes:
        job: The contender, the server and the data.
        store: File by which they find each other.
    """

    job: Job
    store: str


def run_tensor_rank(job: TensorRankJob, rank: int, parent: Connection) -> None:
    """Be a rank until the parent closes the connection. Runs in a fork of it."""
    stored = Checkpoint(job.job.data / BUCKET / checkpoint_of(job.job.workload))
    rows = quarter(rank)
    set_rank(job.job, rank, RANKS)
    load = {"mpreader": _mpreader, "runai": _runai}[job.job.contender](stored, rows)
    join(job.store, rank, RANKS)
    loaded: dict[str, torch.Tensor] = {}

    def load_into() -> None:
        loaded.update(load())

    def check() -> None:
        check_tensors(loaded, list(stored.shapes), stored.folder, rows)

    take_turns(parent, loaded.clear, load_into, check if job.job.checking else None)


def _mpreader(stored: Checkpoint, rows: Callable[[int], slice]) -> Load:
    from mpreader import S3ClientConfig
    from mpreader.safetensors import load_checkpoint

    slices = {name: (rows(shape[0]),) for name, shape in stored.shapes.items()}
    config = S3ClientConfig(force_path_style=True)
    uri = f"s3://{BUCKET}/{stored.folder.name}"
    return lambda: load_checkpoint(uri, slices=slices, share_host=True, s3client_config=config)


def _runai(stored: Checkpoint, rows: Callable[[int], slice]) -> Load:
    """Run:ai's streamer broadcasts all tensors to all ranks, in buffers that it reuses; each clones its rows."""
    os.environ["RUNAI_STREAMER_DIST"] = "1"
    streamer = runai_streamer()
    files = [f"s3://{BUCKET}/{key}" for key in stored.files]

    def load() -> dict[str, torch.Tensor]:
        with streamer() as session:
            session.stream_files(files, device="cpu", is_distributed=True, owned=False)
            return {name: tensor[rows(len(tensor))].clone() for name, tensor in session.get_tensors()}

    return load
