"""Sizes of a pool: workers, connections and memory, derived from the settings and the host. Pure arithmetic.

S3 gives about 90 MB/s to a connection and answers after 30 to 200 ms, so throughput is connections times 90 MB/s and
needs as many parts in flight. Shared memory beyond that only holds what the consumer has not taken yet: the *window*
read ahead is the parts in flight and a quarter as many again; how many of the connections are used is decided by
:mod:`mpreader.pool.coordinator.concurrency`. ``max_bytes`` is far larger by default, because it also
bounds what callers hold on to (``RangeFetcher.fetch``, views that are kept).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mpreader.config import MIN_PART_BYTES, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.host import Host

__all__ = ["GRAIN_BYTES", "PoolSizes", "size_pool"]

# Slots start and end at multiples of this: holes stay few, and small slots keep apart from each other's cache lines.
GRAIN_BYTES: Final = 64 * 1024
MAX_WORKERS: Final = 8
CONNECTIONS_PER_WORKER: Final = 16
CONNECTION_BYTES_PER_S: Final = 90_000_000
MIN_PARTS_IN_MEMORY: Final = 16
SEGMENT_BYTES: Final = 16 * MiB
MIN_SEGMENTS: Final = 8


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """The numbers a pool is built with.

    Attributes:
        workers: Worker processes.
        connections_per_worker: Connections, and threads, of each.
        part_bytes: Most bytes of one ranged GET.
        block_bytes: Largest slot in a shared segment: a part, rounded up.
        segment_bytes: Size of a shared segment.
        window_bytes: Most bytes that are in flight or wait to be taken.
        max_bytes: Most bytes of shared memory reserved at one time.
    """

    workers: int
    connections_per_worker: int
    part_bytes: int
    block_bytes: int
    segment_bytes: int
    window_bytes: int
    max_bytes: int


def size_pool(config: PoolConfig, s3client_config: S3ClientConfig, host: Host) -> PoolSizes:
    """Derive a pool's numbers from the settings and, where they are silent, from the host.

    Raises:
        ConfigError: The host has too little memory for any pool.
    """
    max_bytes = config.value("max_memory") or _spare_bytes(host)
    workers = config.value("workers") or min(MAX_WORKERS, host.own_cores)
    connections = config.value("connections_per_worker") or _connections(workers, s3client_config)
    part_bytes = _part_bytes(config.value("part_size") or s3client_config.part_size, max_bytes)
    block_bytes = math.ceil(part_bytes / GRAIN_BYTES) * GRAIN_BYTES
    in_flight = workers * connections * block_bytes
    # A view that is held keeps its segment: the others must leave room for one large slot.
    segment_bytes = min(SEGMENT_BYTES, max_bytes // MIN_SEGMENTS)
    return PoolSizes(
        workers=workers,
        connections_per_worker=connections,
        part_bytes=part_bytes,
        block_bytes=block_bytes,
        segment_bytes=max(block_bytes, segment_bytes // GRAIN_BYTES * GRAIN_BYTES),
        window_bytes=min(max_bytes, in_flight + max(block_bytes, in_flight // 4)),
        max_bytes=max_bytes,
    )


def _spare_bytes(host: Host) -> int:
    spare, shm = host.free_memory // 2, ""
    remedy = "End what takes the memory, or"
    if host.free_shm is not None:
        spare, shm = min(spare, host.free_shm * 8 // 10), f", {host.free_shm} in /dev/shm"
        remedy = "Mount or enlarge that (docker run --shm-size=1g), or"
    spare //= host.sharers
    if spare < 4 * MIN_PART_BYTES:
        raise ConfigError(
            f"too little memory for shared memory: {host.free_memory} bytes are free under the memory limit{shm}, for "
            f"{host.sharers} processes. {remedy} set PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
        )
    return spare


def _connections(workers: int, s3client_config: S3ClientConfig) -> int:
    target = s3client_config.throughput_target_gbps
    if target is None:
        return CONNECTIONS_PER_WORKER
    return max(1, math.ceil(target * 1e9 / 8 / CONNECTION_BYTES_PER_S / workers))


def _part_bytes(wanted: int, max_bytes: int) -> int:
    # With less memory, smaller parts: enough of them to keep several connections and the consumer busy.
    affordable = max_bytes // MIN_PARTS_IN_MEMORY
    if wanted <= affordable:
        return wanted
    return max(MIN_PART_BYTES, 1 << (affordable.bit_length() - 1)) if affordable else MIN_PART_BYTES
