"""Sizes that fit any host."""

from __future__ import annotations

import errno
import itertools
import os

import pytest

from mpreader.config import MIN_PART_BYTES, KiB, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.host import Cgroup, Host
from mpreader.pool.sizing import size_pool

GiB = 1024 * MiB


@pytest.fixture(autouse=True)
def _no_settings_of_the_developer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MPREADER_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("cores", [1, 2, 8, 64, 192])
@pytest.mark.parametrize("sharers", [1, 8])
def test_sizing_fits_the_host(cores: int, sharers: int) -> None:
    memories = (4 * MiB, 256 * MiB, 4 * GiB, 2000 * GiB)
    for free_memory, free_shm in itertools.product(memories, (4 * MiB, 64 * MiB, 500 * GiB, None)):
        # None: shared memory is bounded by nothing but the free memory.
        share = min(free_memory // 2, 1 << 60 if free_shm is None else free_shm * 8 // 10) // sharers
        sizes = size_pool(PoolConfig(), S3ClientConfig(), Host(cores, free_memory, free_shm, sharers))
        assert 1 <= sizes.workers <= min(8, max(1, cores // sharers))
        assert sizes.connections_per_worker >= 1
        assert MIN_PART_BYTES <= sizes.part_bytes <= sizes.block_bytes < 2 * sizes.part_bytes
        assert sizes.block_bytes % (64 * KiB) == sizes.segment_bytes % (64 * KiB) == 0
        assert sizes.segment_bytes >= sizes.block_bytes
        assert sizes.block_bytes <= sizes.window_bytes <= sizes.max_bytes
        # All sharers together leave half of the memory, and a fifth of /dev/shm, to others.
        assert sizes.max_bytes <= share
        # Enough parts that several connections and the consumer have something to do.
        assert sizes.max_bytes // sizes.block_bytes >= 4


def test_sizing_without_memory_says_what_to_do() -> None:
    for host in (Host(2, 400 * KiB, GiB), Host(2, GiB, 300 * KiB), Host(8, 4 * MiB, None, sharers=16)):
        with pytest.raises(ConfigError, match="MPREADER_MAX_MEMORY"):
            size_pool(PoolConfig(), S3ClientConfig(), host)


def test_sizing_of_a_large_host_keeps_the_parts_of_the_client_config() -> None:
    host = Host(192, 1000 * GiB, 500 * GiB)
    sizes = size_pool(PoolConfig(), S3ClientConfig(part_size=16 * MiB), host)
    assert sizes.part_bytes == 16 * MiB
    assert sizes.workers == 8
    assert sizes.window_bytes >= sizes.workers * sizes.connections_per_worker * sizes.part_bytes


def test_sizing_takes_what_is_set() -> None:
    config = PoolConfig(workers=3, connections_per_worker=5, max_memory=100 * MiB, part_size=3 * MiB)
    sizes = size_pool(config, S3ClientConfig(), Host(1, 1, 1))
    assert (sizes.workers, sizes.connections_per_worker, sizes.max_bytes) == (3, 5, 100 * MiB)
    assert sizes.part_bytes == 3 * MiB
    assert sizes.block_bytes == 3 * MiB


def test_sizing_target_throughput_decides_the_connections() -> None:
    host = Host(4, 64 * GiB, 64 * GiB)
    # 10 Gbit/s are 1250 MB/s: 14 connections of 90 MB/s, on 4 workers.
    sizes = size_pool(PoolConfig(), S3ClientConfig(throughput_target_gbps=10), host)
    assert sizes.workers * sizes.connections_per_worker == 16
    assert size_pool(PoolConfig(), S3ClientConfig(throughput_target_gbps=0.1), host).connections_per_worker == 1


def test_host_divides_itself_by_local_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert Host.now().sharers == 8
    for wrong in ("rubbish", "-2", "\u00b2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", wrong)
        assert Host.now().sharers == 1


def test_host_is_measured() -> None:
    host = Host.now()
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert 0 < host.free_memory <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host.free_shm is None or host.free_shm > 0


@pytest.mark.parametrize("max_memory", [256 * KiB, 4 * MiB, 51 * MiB, 300 * MiB, 4 * GiB])
def test_sizing_one_held_view_does_not_pin_much(max_memory: int) -> None:
    sizes = size_pool(PoolConfig(max_memory=max_memory), S3ClientConfig(), Host(2, GiB, GiB))
    assert sizes.segment_bytes <= max(sizes.block_bytes, max_memory // 8)


@pytest.mark.parametrize(
    ("cores", "together", "sharers", "workers"),
    [
        (64, 64, 8, 8),  # torchrun: all ranks may run on all cores
        (16, 16, 8, 2),
        (8, 64, 8, 8),  # the launcher has bound each rank to cores of its own
        (4, 32, 8, 4),
        (32, 64, 8, 8),  # two groups of four ranks, each bound to a processor
        (8, 16, 8, 2),
        (2, 0, 8, 1),
    ],
)
def test_cores_that_a_launcher_gives_to_each_rank_are_not_divided_again(
    cores: int, together: int, sharers: int, workers: int
) -> None:
    host = Host(cores, GiB, None, sharers, together)
    assert size_pool(PoolConfig(), S3ClientConfig(), host).workers == workers


def test_cores_of_the_launcher_are_those_of_the_process_that_started_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of_process = {0: {0, 1}, os.getppid(): set(range(8))}
    monkeypatch.setattr(os, "sched_getaffinity", of_process.__getitem__)
    monkeypatch.setattr("mpreader.host.Cgroup.of", lambda _: Cgroup())
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    host = Host.now()
    assert (host.cores, host.sharers, host.cores_of_all, host.own_cores) == (2, 4, 8, 2)
    monkeypatch.setattr("mpreader.host.Cgroup.of", lambda _: Cgroup(2, 4.0))  # a quota for all of them
    assert Host.now().own_cores == 1


def test_host_that_tells_nothing_is_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.ENOSYS, "refused")

    for name in ("sched_getaffinity", "statvfs", "sysconf", "memfd_create"):
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("pathlib.Path.read_text", refused)
    monkeypatch.setattr("mpreader.host._own_memory_groups", lambda _: [])
    host = Host.now()
    assert (host.cores, host.free_memory, host.free_shm) == (os.cpu_count() or 1, 512 * MiB, None)
    assert size_pool(PoolConfig(), S3ClientConfig(), host).max_bytes > 0
