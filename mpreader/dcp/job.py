"""Job on one host: what each of its ranks does to load a checkpoint by ``torch.distributed.checkpoint.load``.

:mod:`mpreader.tools.ranks` starts the ranks. They load as a program's ranks do, into targets that are made from what
``.metadata`` says. Items that are no tensors are received, and never unpickled.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mpreader.dcp.loader import DroppingPlanner
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.sharding import shard_of
from mpreader.dcp.state import touch_memory

try:
    from torch.distributed.tensor import DTensor, Shard
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor, Shard  # type: ignore[attr-defined,no-redef,unused-ignore]

__all__ = ["Described", "describe", "join", "load_together", "local_bytes", "make_targets", "wait_for_all"]

# A rank that has stopped, but lives, is noticed after this time. One that ends is noticed at once.
_TIMEOUT: Final = datetime.timedelta(minutes=10)

Described = Mapping[str, "tuple[tuple[int, ...], torch.dtype] | None"]
"""Shape and type of each tensor of a checkpoint, and None for each other item; can be pickled."""


def describe(state: Mapping[str, Any]) -> Described:
    """Returns the description of a state from :func:`~mpreader.dcp.state.empty_state`."""
    return {
        fqn: (tuple(value.size()), value.dtype) if isinstance(value, torch.Tensor) else None
        for fqn, value in state.items()
    }


def join(rank: int, ranks: int, port: int, listening: int | None) -> None:
    """Become a rank of the job.

    Args:
        rank: The rank.
        ranks: Number of ranks.
        port: Port of 127.0.0.1 on which the ranks find each other.
        listening: Descriptor of the socket that listens there, in the first rank; else None.
    """
    make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # its stubs do not export it
    store = make_store(
        "127.0.0.1",
        port,
        ranks,
        is_master=listening is not None,
        timeout=_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listening,
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)


def make_targets(described: Described, dim: int | None) -> dict[str, Any]:
    """Returns the targets of this rank, in memory that has been touched.

    Args:
        described: What the checkpoint holds.
        dim: Dimension in which tensors are divided among the ranks; those that don't have it are on all ranks, whole.
            None: all of them are.
    """
    mesh = None if dim is None else init_device_mesh("cpu", (dist.get_world_size(),))
    targets: dict[str, Any] = {}
    for fqn, entry in described.items():
        if entry is None:
            targets[fqn] = None
            continue
        size, dtype = torch.Size(entry[0]), entry[1]
        if mesh is None or dim is None or dim >= len(size):
            targets[fqn] = _touched(size, dtype)
        else:
            targets[fqn] = _sharded(size, dtype, mesh, dim)
    return targets


def local_bytes(targets: Mapping[str, Any]) -> int:
    """Returns the bytes that the targets of this rank have in its memory."""
    tensors = [value.to_local() if isinstance(value, DTensor) else value for value in targets.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def load_together(reader: S3StorageReader, targets: dict[str, Any]) -> float:
    """Load into the targets, with all other ranks; returns the seconds that it took this rank.

    Raises:
        MpreaderError: The load has failed here or in another rank.
    """
    wait_for_all()
    started = time.perf_counter()
    with _first_failure():
        load(dict(targets), storage_reader=reader, planner=DroppingPlanner())
    return time.perf_counter() - started


def wait_for_all() -> None:
    """Wait until all ranks are here."""
    dist.barrier()


def _touched(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty(size, dtype=dtype)
    touch_memory({"": target})  # else the load would pay for the page faults
    return target


def _sharded(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh, dim: int) -> Any:
    local = _touched(shard_of(size, dim, dist.get_rank(), dist.get_world_size()).sizes, dtype)
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(dim)], run_check=False, shape=size, stride=stride)


@contextlib.contextmanager
def _first_failure() -> Iterator[None]:
    """Raise the error of the first rank that has failed, in place of torch's collection of all."""
    try:
        yield
    except CheckpointException as error:
        failures = error.failures
        raise failures[min(failures)][0] from None
