"""Timed loads of a checkpoint into memory: they show what a host and its connection to S3 can do.

``mpreader load`` runs them. Nothing of the checkpoint but ``.metadata`` is unpickled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpreader.dcp.loader import check_memory, read_into, read_metadata
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import allocate, empty_state, state_bytes, touch_memory
from mpreader.errors import ConfigError
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.tools.bench.memory import TreeMemory, tree_memory_bytes

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["TimedLoad", "time_loads"]


@dataclass(frozen=True, slots=True)
class TimedLoad:
    """Measurements of one load.

    Attributes:
        starts_workers: True if the time includes starting the worker processes, as in the first load.
        seconds: Wall time, from the request for ``.metadata`` to the last byte in its target.
        nbytes: Bytes of the tensors in memory.
        received_nbytes: Bytes that were received, gaps and repetitions included.
        over_read_nbytes: Bytes received that belong to no item.
        requests: GETs made, those of ``.metadata`` not included.
        retries: GETs that were made again.
        network_wait_s: Seconds during which the load waited for bytes.
        consumer_wait_s: Seconds during which nothing was received, since memory was full of bytes not taken yet.
        extra_memory_bytes: Most memory that this process and its workers took then, beyond what this process had
            before the first load, targets included; shared memory is counted once.
    """

    starts_workers: bool
    seconds: float
    nbytes: int
    received_nbytes: int
    over_read_nbytes: int
    requests: int
    retries: int
    network_wait_s: float
    consumer_wait_s: float
    extra_memory_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9 bytes) of tensors per second."""
        return self.nbytes / self.seconds / 1e9


def time_loads(
    uri: str | os.PathLike[str],
    repeat: int = 1,
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    verify: bool = True,
    allowed_globals: Iterable[str] = (),
    progress: bool | None = None,
) -> Iterator[TimedLoad]:
    """Load a checkpoint into the same targets again and again.

    The targets are allocated, and touched, before the clock starts.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        repeat: Number of loads, at least 1.
        region: As for :func:`mpreader.dcp.load_checkpoint`, like all that follow.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        max_gap_size: Largest gap, in bytes, between two items that are fetched as one.
        match: Load only what these patterns select.
        verify: True: check the CRC-32s.
        allowed_globals: Classes that ``.metadata`` may make.
        progress: True: show a progress bar for each load. None: on a terminal or in a notebook.

    Yields:
        The measurements of each load, when it is over.

    Raises:
        ConfigError: ``repeat`` is less than 1.
        MpreaderError: As for :func:`mpreader.dcp.load_checkpoint`.
    """
    if repeat < 1:
        raise ConfigError(f"repeat must be at least 1, got {repeat}")
    # Planned with readers that start no processes: starting them is part of the first load.
    plain = S3ReaderConstructor.sequential()
    with S3StorageReader(region, uri, s3client_config, plain, allowed_globals=allowed_globals) as reader:
        planned = empty_state(read_metadata(reader), match)
        check_memory(planned, reader, pool_config)
    state = allocate(planned)
    touch_memory(state)
    constructor = S3ReaderConstructor.multiprocess(max_gap_size, pool_config=pool_config, progress=progress)
    reader = S3StorageReader(region, uri, s3client_config, constructor, verify=verify, allowed_globals=allowed_globals)
    with reader:
        memory_before = tree_memory_bytes(os.getpid())
        for number in range(repeat):
            yield _timed(reader, state, memory_before, starts_workers=number == 0)


def _timed(reader: S3StorageReader, state: dict[str, Any], memory_before: int, *, starts_workers: bool) -> TimedLoad:
    added_before = tree_memory_bytes(os.getpid()) - memory_before
    with TreeMemory() as memory:
        started = time.perf_counter()
        reader.reset()
        read_into(reader, reader.read_metadata(), state, _drop)
        seconds = time.perf_counter() - started
    # A short load may fall between two samples of the sampler.
    added = tree_memory_bytes(os.getpid()) - memory_before
    stats = reader.stats
    return TimedLoad(
        starts_workers=starts_workers,
        seconds=seconds,
        nbytes=state_bytes(state),
        received_nbytes=stats.bytes,
        over_read_nbytes=stats.over_read,
        requests=stats.requests,
        retries=stats.retries,
        network_wait_s=stats.seconds,
        consumer_wait_s=stats.consumer_seconds,
        extra_memory_bytes=max(added, added_before + memory.peak_extra_bytes),
    )


def _drop(fqn: str, stored: object) -> None:
    """Drop an item that is no tensor: it was received and checked, and unpickling it might run foreign code."""
