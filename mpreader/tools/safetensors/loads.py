"""Timed loads of safetensors files into memory, as :mod:`mpreader.tools.bench.loads` makes them of DCP checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.dcp.state import state_bytes, touch_memory
from mpreader.errors import PlanError
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.fetch.safetensors import FileFetcher, fetcher_of, files_of, opened
from mpreader.host import Host
from mpreader.pool.pool import close_shared_pools
from mpreader.pool.sizing import size_pool
from mpreader.pool.stats import PoolStats
from mpreader.safetensors.fill import fill
from mpreader.safetensors.wanted import choose, empty_targets, want_targets
from mpreader.tools.bench.counts import counts_of
from mpreader.tools.bench.loads import TimedLoad
from mpreader.tools.bench.memory import TreeMemory, tree_memory_bytes
from mpreader.tools.safetensors.inspection import matching

__all__ = ["SafetensorsLoad", "time_safetensors_loads"]


class SafetensorsLoad(NamedTuple):
    """Load to be timed: its source, the tensors that it takes, and its settings.

    Attributes:
        uri: URI, URL or path of a file or of a directory.
        match: Patterns that select the tensors; None: all of them.
        headers: Headers for a web server.
        progress: Progress bar: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
    """

    uri: str
    match: Collection[str] | None = None
    headers: Mapping[str, str] | None = None
    progress: bool | None = None
    s3client_config: S3ClientConfig | None = None
    pool_config: PoolConfig | None = None

    def fetcher(self) -> FileFetcher:
        """Make what reads the files; the caller closes it."""
        return fetcher_of(self.uri, self.s3client_config, self.pool_config, self.headers)


def time_safetensors_loads(load: SafetensorsLoad, repeat: int = 1) -> Iterator[TimedLoad]:
    """Load into the same targets ``repeat`` times; they are allocated, and touched, before the clock starts.

    Yields:
        The measurements of each load, when it is over; requests and bytes are those for headers, too.

    Raises:
        MpreaderError: As for :func:`mpreader.safetensors.load_checkpoint`.
    """
    targets = _targets_of(load)
    with load.fetcher() as fetcher:
        memory_before = tree_memory_bytes(os.getpid())
        for number in range(repeat):
            starts_workers = number == 0 and isinstance(fetcher, RangeFetcher)
            yield _timed(fetcher, load, targets, memory_before, starts_workers=starts_workers)


def _targets_of(load: SafetensorsLoad) -> dict[str, Any]:
    """Return targets for the tensors that match, in memory that has been touched.

    Raises:
        PlanError: They take more memory than is free.
    """
    with load.fetcher() as fetcher, opened(fetcher, files_of(fetcher, load.uri)) as files:
        chosen = matching(files, load.match)
    close_shared_pools()  # so that the first timed load starts the workers
    nbytes = sum(stored.end - stored.start for _, stored in chosen)
    host = Host.now()
    window = size_pool(load.pool_config or PoolConfig(), load.s3client_config or S3ClientConfig(), host).window_bytes
    if nbytes + window > host.free_memory:
        raise PlanError(
            f"{load.uri}: its tensors take {nbytes} bytes, and up to {window} bytes of shared memory are used to load "
            f"them, but only {host.free_memory} bytes of memory are free here; select some of them (--match)"
        )
    targets = empty_targets(chosen)
    touch_memory(targets)
    return targets


def _timed(
    fetcher: FileFetcher, load: SafetensorsLoad, targets: dict[str, Any], memory_before: int, *, starts_workers: bool
) -> TimedLoad:
    names = None if load.match is None else list(targets)
    added_before = tree_memory_bytes(os.getpid()) - memory_before  # as in the loads of DCP checkpoints
    before = _stats_of(fetcher)
    with TreeMemory() as memory:
        started = time.perf_counter()
        with opened(fetcher, files_of(fetcher, load.uri, names)) as files:
            fill(fetcher, list(want_targets(choose(files, names), None, targets)), progress=load.progress)
        seconds = time.perf_counter() - started
    added = tree_memory_bytes(os.getpid()) - memory_before
    nbytes = state_bytes(targets)
    return TimedLoad(
        starts_workers=starts_workers,
        seconds=seconds,
        nbytes=nbytes,
        extra_memory_bytes=max(added, added_before + memory.peak_extra_bytes),
        **_counts(before, _stats_of(fetcher), nbytes),
    )


def _stats_of(fetcher: FileFetcher) -> PoolStats:
    """Return the statistics so far; of local files there are none."""
    return fetcher.stats if isinstance(fetcher, RangeFetcher) else PoolStats()


def _counts(before: PoolStats, after: PoolStats, nbytes: int) -> dict[str, Any]:
    """Return the counts of one load; the statistics of a pool count on."""
    counts = {name: value - counts_of(before)[name] for name, value in counts_of(after).items()}
    return {**counts, "unverified_nbytes": nbytes}
