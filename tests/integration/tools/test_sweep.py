"""Measurements of a sweep are what they say."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpreader import S3Client
from mpreader.config import KiB, MiB, S3ClientConfig
from mpreader.errors import ObjectMissing, PlanError, PoolTimeout
from mpreader.telemetry.events import RequestEvent, add_observer, remove_observer
from mpreader.testing import Fault, FaultKind, FaultServer
from mpreader.tools.bench.measurement import Benchmark, Settings
from mpreader.tools.bench.objects import SourceObject, find_objects
from mpreader.tools.bench.sweep import sweep

_DATA = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/data": _DATA, "/empty": b""}) as server:
        yield server


@pytest.fixture
def events() -> Iterator[list[RequestEvent]]:
    """Every request of this process's workers."""
    seen: list[RequestEvent] = []
    add_observer(seen.append)
    yield seen
    remove_observer(seen.append)


def test_largest_objects_below_a_prefix_are_read(bucket: str) -> None:
    client = S3Client()
    for name, size in {"run/a": 10, "run/b": 300, "run/c": 200, "run/d": 0, "runs": 1000}.items():
        with client.put_object(bucket, name) as writer:
            writer.write(bytes(size))
    client.close()

    def found(key: str, nbytes: int) -> list[tuple[str, int]]:
        objects = find_objects(f"s3://{bucket}/{key}", nbytes, S3ClientConfig())
        return [(item.source.removeprefix(f"s3://{bucket}/"), item.nbytes) for item in objects]

    assert found("run/", 300) == [("run/b", 300)]
    assert found("run", 301) == [("run/b", 300), ("run/c", 200)]
    assert found("run", 10_000) == [("run/b", 300), ("run/c", 200), ("run/a", 10)]
    assert found("run/a", 10_000) == [("run/a", 10)]
    assert found("", 1) == [("runs", 1000)]
    with pytest.raises(PlanError, match="run/d is empty"):
        found("run/d", 1)
    for missing in ("ru", "ru/"):
        with pytest.raises(ObjectMissing, match=f"{bucket}/{missing}"):
            found(missing, 1)


def test_measurement_asks_for_parts_of_the_size_with_the_workers_it_says(
    server: FaultServer, events: list[RequestEvent]
) -> None:
    benchmark = Benchmark([SourceObject(server.url("/data"), len(_DATA))], 5 * MiB, 60, S3ClientConfig())
    advanced: list[int] = []
    done = benchmark.measure(Settings(3, 2, 256 * KiB), advanced.append)
    asked = [request.range for request in server.requests if request.method == "GET"]
    sizes = [end - start + 1 for start, end in (map(int, text[6:].split("-")) for text in asked if text)]
    assert sizes.count(256 * KiB) == 20  # the 2 MiB twice and a half
    assert set(sizes) == {64 * KiB, 256 * KiB}  # the small ones warm the workers up
    assert {event.worker for event in events} == {0, 1, 2}
    assert {event.connection for event in events} <= {0, 1}
    assert (done.nbytes, done.requests, done.retries) == (5 * MiB, 20, 0)
    assert sum(advanced) == 5 * MiB
    assert done.memory_bytes > 256 * KiB
    assert 0 < done.cpu_seconds < 60


def test_measurement_of_a_few_bytes_does_not_wait_for_workers_that_have_nothing_to_do(server: FaultServer) -> None:
    server.put("/data", b"x")
    done = Benchmark([SourceObject(server.url("/data"), 1)], 3, 10, S3ClientConfig()).measure(Settings(2, 1, MiB), int)
    assert (done.nbytes, done.requests) == (3, 3)


def test_measurement_counts_retries(server: FaultServer) -> None:
    # The warm-up reads the first bytes of each half only.
    server.inject(Fault(FaultKind.RESET, covering=200_000, at=(1,)))
    benchmark = Benchmark([SourceObject(server.url("/data"), len(_DATA))], MiB, 60, S3ClientConfig())
    done = benchmark.measure(Settings(1, 1, 512 * KiB), int)
    assert (done.nbytes, done.retries) == (MiB, 1)


def test_sweep_that_is_too_slow_reads_less_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Settings(1, 1, 64 * KiB).environment().items():
        monkeypatch.setenv(name, value)
    with FaultServer({"/data": _DATA}, bytes_per_s=1e6) as server:
        grid = {"workers": [1], "connections_per_worker": [1], "part_size": [64 * KiB]}
        done = sweep(server.url("/data") + "?secret", grid=grid, seconds=0.6, repeat=1)
    assert done.defaults == Settings(1, 1, 64 * KiB)
    assert 0 < done.nbytes < done.wanted_nbytes == done.source_nbytes == len(_DATA)
    assert list(done.rounds["workers"]) == [done.defaults]
    assert done.source.endswith("/data")


def test_sweep_in_which_nothing_comes_ends_with_its_time(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_WORKERS", "1")
    monkeypatch.setenv("MPREADER_CONNECTIONS_PER_WORKER", "1")
    server.inject(Fault(FaultKind.STALL, covering=200_000, seconds=60))
    with pytest.raises(PoolTimeout, match=r"not one part was received in 0\.2 s: allow more seconds"):
        sweep(server.url("/data"), seconds=0.6, repeat=3)


def test_parts_that_memory_does_not_allow_are_not_measured_twice(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPREADER_MAX_MEMORY", "8MiB")  # for parts of 512 KiB
    grid = {"workers": [1], "connections_per_worker": [2], "part_size": [256 * KiB, 4 * MiB, 16 * MiB]}
    done = sweep(server.url("/data"), grid=grid, nbytes=MiB, repeat=2)
    assert [each.part_size for each in done.axes["part_size"].results] == [256 * KiB, 512 * KiB]
