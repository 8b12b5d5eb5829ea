"""Timed loads of a checkpoint into memory: they show how fast a host and its connection to S3 can load it.

``mpreader load`` runs them and prints the results. They unpickle nothing of the checkpoint but ``.metadata``, which is
read through an allowlist.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.loader import read_into
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import allocate, state_bytes, touch_memory
from mpreader.tools.bench.counts import LoadCounts, counts_of
from mpreader.tools.bench.memory import TreeMemory, tree_memory_bytes
from mpreader.tools.bench.targets import planned_state

__all__ = ["TimedLoad", "time_loads"]


@dataclass(frozen=True, slots=True)
class TimedLoad(LoadCounts):
    """Measurements of one load.

    Attributes:
        starts_workers: True if the time includes starting the worker processes, as in the first load.
        seconds: Wall time, from the request for ``.metadata`` to the last byte in its target.
        nbytes: Bytes of the tensors in memory.
        extra_memory_bytes: Most memory that this process and its workers took during the load, beyond what they had
            before the first load; the targets were there by then. Shared memory is counted once.
    """

    starts_workers: bool
    seconds: float
    nbytes: int
    extra_memory_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9 bytes) of tensors per second."""
        return self.nbytes / self.seconds / 1e9


def time_loads(uri: str, options: LoadOptions, repeat: int = 1) -> Iterator[TimedLoad]:
    """Load a checkpoint into the same targets ``repeat`` times.

    The targets are allocated, and touched, before the clock starts.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        options: Options of each load. ``weights_only`` is of no effect: items that are no tensors are dropped.
        repeat: Number of loads.

    Yields:
        The measurements of each load, when it is over.

    Raises:
        MpreaderError: As for :func:`mpreader.dcp.load_checkpoint`.
    """
    state = allocate(planned_state(uri, options))
    touch_memory(state)  # else the first load would pay for the page faults of its targets
    with options.open_reader(uri) as reader:
        memory_before = tree_memory_bytes(os.getpid())
        for number in range(repeat):
            yield _timed(reader, state, memory_before, starts_workers=number == 0)


def _timed(reader: S3StorageReader, state: dict[str, Any], memory_before: int, *, starts_workers: bool) -> TimedLoad:
    # TreeMemory counts from its own start: what an earlier load has left in the pool is added below.
    added_before = tree_memory_bytes(os.getpid()) - memory_before
    with TreeMemory() as memory:
        started = time.perf_counter()
        reader.reset()  # as torch's load() does first: it starts the time and the counts of this load
        read_into(reader, reader.read_metadata(), state, _drop)
        seconds = time.perf_counter() - started
    # A load shorter than the sampler's interval has no sample; the pool still holds its memory now.
    added = tree_memory_bytes(os.getpid()) - memory_before
    return TimedLoad(
        starts_workers=starts_workers,
        seconds=seconds,
        nbytes=state_bytes(state),
        extra_memory_bytes=max(added, added_before + memory.peak_extra_bytes),
        **counts_of(reader.stats),
    )


def _drop(fqn: str, stored: object) -> None:
    """Drop an item that is not a tensor: it was received and checked, but unpickling it could run foreign code."""
