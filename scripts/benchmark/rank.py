"""One rank of a job that is measured: a process that loads with the others when ranks.py says so."""

from __future__ import annotations

import datetime
import mmap
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from checkpoints import BUCKET, Checkpoint
from isal import isal_zlib
from loads import reader_maker, warm_up
from measure import set_environment
from tasks import Job, WrongBytes
from torch.distributed.checkpoint.state_dict_loader import load

__all__ = ["Layout", "RankJob", "join", "run_rank", "set_rank", "take_turns"]

_TIMEOUT: Final = datetime.timedelta(seconds=120)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors are on the ranks.

    Attributes:
        mesh: Shape of the mesh of ranks; empty: each rank has whole tensors.
        dims: For each dimension of the mesh the dimension in which tensors are divided; None: they are replicated.
    """

    mesh: tuple[int, ...] = ()
    dims: tuple[int | None, ...] = ()


@dataclass(frozen=True, slots=True)
class RankJob:
    """What the ranks do.

    Attributes:
        job: The contender, the server and the data; its workload is the name of the checkpoint.
        ranks: Number of ranks.
        layout: How the tensors are on them.
        store: File by which they find each other.
        memory: Memory that all ranks have as the targets, whose contents are the same; None: each has its own.
    """

    job: Job
    ranks: int
    layout: Layout
    store: str
    memory: mmap.mmap | None


def run_rank(job: RankJob, rank: int, parent: Connection) -> None:
    """Be a rank until the parent closes the connection. Runs in a fork of it."""
    checkpoint = Checkpoint(job.job.data / BUCKET / job.job.workload)
    set_rank(job.job, rank, job.ranks)
    make_reader = reader_maker(job.job.contender, f"s3://{BUCKET}/{checkpoint.folder.name}", job.job)
    warm_up(job.job)
    join(job.store, rank, job.ranks)
    targets = _targets(checkpoint.shapes, job.layout, job.memory)

    def prepare() -> None:
        for tensor in targets.values():
            _local(tensor).fill_(1)  # so that nothing is right by chance, and that all memory has been touched

    take_turns(
        parent,
        prepare,
        lambda: load(dict(targets), storage_reader=make_reader()),
        (lambda: _check(targets, checkpoint)) if job.job.checking else None,
    )


def set_rank(job: Job, rank: int, ranks: int) -> None:
    """Make the environment of this process that of a rank, as torchrun does."""
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    )
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in warm_up
    set_environment(job)


def join(store: str, rank: int, ranks: int) -> None:
    """Wait for the other ranks, which find each other by the file ``store``, and be one process group with them."""
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=_TIMEOUT)


def take_turns(
    parent: Connection, prepare: Callable[[], None], load: Callable[[], object], check: Callable[[], None] | None
) -> NoReturn:
    """Load whenever the parent says so, together with the other ranks, until it closes the connection.

    Args:
        parent: The connection.
        prepare: Called before each load, and not timed.
        load: What is timed.
        check: Compares what was loaded; None: nothing is compared.
    """
    while True:
        prepare()
        dist.barrier()
        parent.send("ready")
        parent.recv()
        dist.barrier()
        started = time.perf_counter()
        load()
        seconds = time.perf_counter() - started
        dist.barrier()
        parent.send(seconds)
        if check is not None:
            parent.recv()  # memory is sampled until all ranks have told
            check()
            dist.barrier()  # ranks may have their targets in the same memory: none fills it while others check


def _targets(shapes: Mapping[str, Sequence[int]], layout: Layout, memory: mmap.mmap | None) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    if not layout.mesh:
        return _whole(shapes, memory)
    mesh = init_device_mesh("cpu", layout.mesh)
    return {name: _divided(torch.Size(shape), mesh, layout.dims) for name, shape in shapes.items()}


def _whole(shapes: Mapping[str, Sequence[int]], memory: mmap.mmap | None) -> dict[str, Any]:
    if memory is None:
        return {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    flat, start, targets = torch.frombuffer(memory, dtype=torch.bfloat16), 0, {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        targets[name] = flat[start : start + size].view(shape)
        start += size
    return targets


def _divided(size: torch.Size, mesh: Any, dims: tuple[int | None, ...]) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local = list(size)
    placements: list[Any] = []
    for at, dim in enumerate(dims):
        if dim is None or dim >= len(size):
            placements.append(Replicate())
            continue
        rows = -(-local[dim] // mesh.size(at))
        first = min(local[dim], rows * mesh.get_local_rank(at))
        local[dim] = min(rows, local[dim] - first)
        placements.append(Shard(dim))
    stride = torch.empty(size, device="meta").stride()
    tensor = torch.empty(local, dtype=torch.bfloat16)
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=size, stride=stride)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _check(targets: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    for name, tensor in targets.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if isal_zlib.crc32(whole.reshape(-1).view(torch.uint8).numpy()) != checkpoint.crcs[name]:
            raise WrongBytes(name)
