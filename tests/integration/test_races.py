"""Several threads with one fetcher, one pool, one constructor: right bytes, or an error that says what was done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    MultiprocessConstructor,
    PoolClosed,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ReaderConstructor,
    fetch_ranges,
)
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader, S3StorageWriter
from mpreader.pool import pool as pools
from mpreader.pool.coordinator.coordinator import Coordinator
from mpreader.s3.stream import PinnedObject
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

CONFIG = PoolConfig(workers=2, connections_per_worker=2, max_memory=16 * MiB, part_size=128 * KiB)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def fetcher(threads: ThreadPoolExecutor) -> Iterator[RangeFetcher]:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        yield fetcher


def at_once(threads: ThreadPoolExecutor, count: int, call: Callable[[int], object]) -> list[Any]:
    """Results of ``call(number)`` in each of ``count`` threads that begin together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> object:
        barrier.wait(30)
        return call(number)

    return [future.result(30) for future in [threads.submit(begin, number) for number in range(count)]]


def worker_processes() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_text(errors="replace")
        except OSError:
            continue
        if "mpreader.pool.worker.main" in command and f", {os.getpid()}, " in command:
            found.append(file.parent.name)
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        threading.Event().wait(0.005)


# -- close


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        (Fault(FaultKind.DELAY, method="HEAD", seconds=3600), 1),
        (Fault(FaultKind.DELAY, seconds=3600), 4),
        (Fault(FaultKind.STALL, seconds=3600, after_bytes=100_000), 4),
    ],
    ids=["HEAD", "GET", "body"],
)
def test_close_in_another_thread_ends_a_fetch_that_waits(
    fetcher: RangeFetcher,
    server: FaultServer,
    data: bytes,
    threads: ThreadPoolExecutor,
    fault: Fault,
    requests: int,
) -> None:
    server.inject(fault)
    fetching = threads.submit(fetcher.fetch, server.url("/object"), [(0, len(data))])
    server.wait_for_requests(requests)
    fetcher.close()
    assert worker_processes() == []
    assert isinstance(fetching.exception(30), PoolClosed)


def test_close_in_another_thread_at_any_moment_gives_all_bytes_or_pool_closed(
    server: FaultServer, data: bytes, threads: ThreadPoolExecutor
) -> None:
    were_closed = []
    for requests in (0, 1, 2, 4, 8, 16, 32, 65):
        seen = len(server.requests)
        with RangeFetcher(pool_config=CONFIG) as fetcher:
            fetching = threads.submit(fetcher.fetch, server.url("/object"), [(0, len(data))])
            server.wait_for_requests(seen + requests)
        assert worker_processes() == []
        error = fetching.exception(5)
        assert isinstance(error, PoolClosed) if error else fetching.result() == [data]
        were_closed.append(error is not None)
        del fetching  # and with it the views
    assert True in were_closed


def test_close_in_another_thread_ends_a_stream(
    fetcher: RangeFetcher, server: FaultServer, data: bytes, threads: ThreadPoolExecutor
) -> None:
    size = 128 * KiB
    ranges = [(start, start + size) for start in range(0, len(data), size)]
    has_begun, is_closed = threading.Event(), threading.Event()

    def consume() -> None:
        for index, view in fetcher.stream(server.url("/object"), ranges, max_gap_size=0):
            assert view == data[index * size :][:size]
            has_begun.set()
            assert is_closed.wait(30)

    consuming = threads.submit(consume)
    assert has_begun.wait(30)
    fetcher.close()
    is_closed.set()
    assert isinstance(consuming.exception(5), PoolClosed)


def test_close_in_four_threads_returns_when_the_workers_are_gone(
    fetcher: RangeFetcher, server: FaultServer, threads: ThreadPoolExecutor
) -> None:
    fetcher.fetch(server.url("/object"), [(0, 1000)])
    assert len(worker_processes()) == 2

    def close(_: int) -> list[str]:
        fetcher.close()
        return worker_processes()

    assert at_once(threads, 4, close) == [[]] * 4
    fetcher.close()
    with pytest.raises(PoolClosed):
        fetcher.fetch(server.url("/object"), [(0, 1000)])


# -- first use, and dropped streams


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_first_use_in_eight_threads_starts_one_pool(
    server: FaultServer,
    data: bytes,
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    aws_environment: None,
    scheme: str,
) -> None:
    pools.close_shared_pools()
    started: list[Coordinator] = []

    def start(*arguments: Any) -> Coordinator:
        started.append(Coordinator(*arguments))
        return started[-1]

    monkeypatch.setattr(pools, "Coordinator", start)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint_url)
    server.put("/bucket/object", data)
    uri = "s3://bucket/object" if scheme == "s3" else server.url("/bucket/object")
    results = at_once(threads, 8, lambda number: fetch_ranges(uri, [(number, number + 300_000)], pool_config=CONFIG)[0])
    assert results == [data[number : number + 300_000] for number in range(8)]
    assert len(started) == 1


def test_stream_dropped_in_another_thread_stops_its_downloads(
    fetcher: RangeFetcher, server: FaultServer, data: bytes, threads: ThreadPoolExecutor
) -> None:
    size = 128 * KiB
    ranges = [(start, start + size) for start in range(0, len(data), size)]
    server.inject(*(Fault(FaultKind.DELAY, covering=start, seconds=60) for start, _ in ranges[1:]))
    streams = [fetcher.stream(server.url("/object"), ranges, max_gap_size=0)]
    assert next(streams[0])[1] == data[:size]
    coordinator = fetcher._engine.pool.coordinator
    assert coordinator is not None
    assert not coordinator._scheduler.is_idle
    threads.submit(streams.clear).result(10)
    wait_until(lambda: coordinator._scheduler.is_idle)
    server.inject()
    assert fetcher.fetch(server.url("/object"), [(0, len(data))]) == [data]


# -- loads


def assert_right(state: dict[str, torch.Tensor], number: int) -> None:
    assert all(bool((tensor == number + int(name)).all()) for name, tensor in state.items())


def checkpoint(bucket: str, number: int) -> str:
    """URI of a checkpoint of which tensor ``i`` is full of ``number + i``."""
    uri = f"s3://{bucket}/checkpoint{number}"
    state = {f"{i}": torch.full((64, 1024), float(number + i)) for i in range(24)}
    save(state, storage_writer=S3StorageWriter("us-east-1", uri, thread_count=2), no_dist=True)
    return uri


def test_two_loads_of_one_plan_at_once_are_both_right(bucket: str, threads: ThreadPoolExecutor) -> None:
    uri = checkpoint(bucket, 100)
    constructor = S3ReaderConstructor.multiprocess(pool_config=CONFIG)
    readers = [S3StorageReader("us-east-1", uri, reader_constructor=constructor) for _ in range(2)]

    def load_all(number: int) -> None:
        state = {f"{i}": torch.zeros(64, 1024) for i in range(24)}
        load(state, storage_reader=readers[number], no_dist=True)
        assert_right(state, 100)

    for _ in range(5):
        at_once(threads, 2, load_all)
    for reader in readers:
        reader.close()


def test_two_loads_at_once_on_one_reader_are_right_or_refused(
    bucket: str, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    uris = [checkpoint(bucket, 100), checkpoint(bucket, 200)]
    reader = S3StorageReader("us-east-1", uris[0], pool_config=CONFIG)
    errors: list[BaseException] = []

    def load_all(number: int) -> None:
        state = {f"{i}": torch.zeros(64, 1024) for i in range(24)}
        try:
            load(state, storage_reader=reader, checkpoint_id=uris[number], no_dist=True)
        except CheckpointException as error:
            errors.append(next(iter(error.failures.values()))[0])
        else:
            assert_right(state, 100 * (number + 1))

    for _ in range(10):
        at_once(threads, 2, load_all)
    assert all(isinstance(error, (ValueError, KeyError, PoolClosed)) for error in errors), errors
    assert any("one load at a time" in str(error) for error in errors), errors
    load_all(1)
    assert len(errors) < 20, "nobody was served"
    reader.close()
    caplog.clear()  # torch logs tracebacks, which keep clients and their sockets alive


def test_loads_of_two_plans_at_once_on_one_constructor_are_right_or_refused(
    bucket: str, threads: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    uris = [checkpoint(bucket, 100), checkpoint(bucket, 200)]
    constructor = S3ReaderConstructor.multiprocess(pool_config=CONFIG)
    refused = 0

    def load_all(number: int) -> BaseException | None:
        state = {f"{i}": torch.zeros(64, 1024) for i in range(24)}
        reader = S3StorageReader("us-east-1", uris[number], reader_constructor=constructor)
        try:
            load(state, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            return next(iter(error.failures.values()))[0]
        assert_right(state, 100 * (number + 1))
        return None

    for _ in range(5):
        for error in at_once(threads, 2, load_all):
            refused += error is not None
            # The constructor serves the plan that was made last.
            assert error is None or isinstance(error, (ValueError, PoolClosed)), error
    assert refused < 10, "nobody was served"
    constructor.close()
    caplog.clear()  # torch logs tracebacks, which keep clients and their sockets alive


def test_reader_that_was_made_while_the_plan_changed_reads_nothing_but_what_was_ordered(
    bucket: str, data: bytes
) -> None:
    client = S3Client()
    with client.put_object(bucket, "checkpoint/f") as writer:
        writer.write(data)
    constructor = MultiprocessConstructor(pool_config=CONFIG)

    def plan(offset: int) -> None:
        stored = SimpleNamespace(relative_path="f", offset=offset, length=1000)
        constructor.set_item_ranges_by_file(
            [SimpleNamespace(storage_index=0)], {0: stored}, f"s3://{bucket}/checkpoint"
        )

    for before, after in ((0, 5000), (5000, 0)):
        plan(before)
        old_ranges = constructor._item_ranges_by_file[f"s3://{bucket}/checkpoint/f"]
        plan(after)  # by another thread, between two lines of the constructor
        pinned = PinnedObject(client, bucket, "checkpoint/f", None)
        with constructor._make_reader(bucket, "checkpoint/f", old_ranges, pinned.info, pinned.stream) as reader:
            with pytest.raises(ValueError, match="not within the ranges"):
                b"".join(reader.item(before, 1000).pieces(0, 1000))  # type: ignore[attr-defined]
            assert reader.item(after, 1000).view(0, 1000) == data[after : after + 1000]  # type: ignore[attr-defined]
    constructor.close()
    client.close()
