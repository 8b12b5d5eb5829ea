"""Much at one time, many loads in a row, and more than memory holds: right bytes, in bounded time and memory."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader, S3StorageWriter
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = [pytest.mark.timeout(90), pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

REGION = "us-east-1"
SIZES = "100,000 tiny ranges; one 5 GB item; zero-length range; range past the end"


def test_64_connections_bring_the_right_bytes(server: FaultServer, data: bytes) -> None:
    server.inject(Fault(FaultKind.DELAY, seconds=0.1))  # where answers are as slow as S3's, all connections are used
    size = 64 * KiB
    ranges = [(start, start + size) for start in range(0, len(data), size)]
    config = PoolConfig(workers=4, connections_per_worker=16, max_memory=32 * MiB, part_size=size)
    with RangeFetcher(pool_config=config) as fetcher:
        for _ in range(4):
            for index, view in fetcher.stream(server.url("/object"), ranges, max_gap_size=0):
                assert view == data[index * size :][:size]
        assert all(worker.requests for worker in fetcher.stats.workers)
        assert fetcher.stats.retries == 0
    used = {request.connection for request in server.requests if request.method == "GET"}
    assert 48 <= len(used) <= 64


@pytest.mark.row(SIZES)
def test_100000_tiny_ranges_are_fetched_with_few_requests(server: FaultServer, data: bytes) -> None:
    ranges = [(start, start + 1 + start % 23) for start in range(0, 80 * 100_000, 80)]
    random.Random(1).shuffle(ranges)
    config = PoolConfig(workers=1, connections_per_worker=4, max_memory=16 * MiB, part_size=MiB)
    with RangeFetcher(pool_config=config) as fetcher:
        views = fetcher.fetch(server.url("/object"), ranges)
        assert [bytes(view) for view in views] == [data[start:end] for start, end in ranges]
    assert sum(request.method == "GET" for request in server.requests) <= 9


@pytest.mark.row(SIZES)
def test_item_larger_than_the_memory_is_loaded_in_bounded_memory(bucket: str) -> None:
    stored = torch.arange(16 * MiB, dtype=torch.int32)  # 64 MiB, no two elements alike
    uri = f"s3://{bucket}/large"
    save({"w": stored}, storage_writer=S3StorageWriter(REGION, uri))
    config = PoolConfig(workers=1, connections_per_worker=4, max_memory=8 * MiB)
    state = {"w": torch.full_like(stored, -1)}  # its memory was touched before the measuring begins
    with S3StorageReader(REGION, uri, pool_config=config) as reader:
        reader.read_metadata()
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark of memory begins anew
        before = _memory_bytes("VmHWM")
        load(state, storage_reader=reader)
        grown = _memory_bytes("VmHWM") - before
    assert torch.equal(state["w"], stored)
    assert grown < 24 * MiB


def _memory_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KiB for line in status if line.startswith(f"{name}:"))


# -- many loads in a row

LEAKS = """
import gc, json, os, sys, threading, time, warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
%s

def held():
    gc.collect()
    children = [file.read_text().split() for file in Path("/proc/self/task").glob("*/children")]
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "processes": sum(map(len, children)),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "objects": len(gc.get_objects()),
        # Without shared memory: how much of an arena was touched by now is a matter of timing. One that is not given
        # back is a mapping more.
        "bytes": (resident - shared) * os.sysconf("SC_PAGE_SIZE"),
    }

warm_up, loads = map(int, sys.argv[1:])
for number in range(warm_up):
    load(number)

before = held()
for number in range(warm_up, warm_up + loads):
    load(number)
deadline = time.monotonic() + 30  # threads that were told to end, and memory that is let go of, need a moment
slow = ("threads", "descriptors")
while any((after := held())[name] > before[name] for name in slow) and time.monotonic() < deadline:
    time.sleep(0.01)
print(json.dumps({name: after[name] - before[name] for name in after}))
"""

FETCHES = """
from mpreader import PoolConfig, RangeFetcher, fetch_ranges
config = PoolConfig(workers=1, connections_per_worker=4, max_memory=4 << 20, part_size=128 << 10)

def check(views, ranges):
    for (start, end), view in zip(ranges, views, strict=True):
        words = range(start // 8, end // 8)
        assert view == b"".join(word.to_bytes(8, "little") for word in words)

def load(number):
    ranges = [(number * 800, number * 800 + 200_000), (7_000_000, 7_000_000 + number * 8)]
    check(fetch_ranges({url!r}, ranges, pool_config=config), ranges)
    if number % 10 == 0:
        with RangeFetcher(pool_config=config) as fetcher:
            check(fetcher.fetch({url!r}, ranges), ranges)
            next(fetcher.stream({url!r}, [(0, 800), (4_000_000, 4_000_800)], max_gap_size=0))
"""

LOADS = """
import torch, torch.distributed.checkpoint as dcp
from mpreader import PoolConfig
from mpreader.dcp import S3StorageReader
config = PoolConfig(workers=1, connections_per_worker=4, max_memory=4 << 20)

def load(number):
    state = {{"w": torch.zeros(8, 16384), "b": torch.zeros(100), "step": 0}}
    reader = S3StorageReader("us-east-1", {uri!r}, pool_config=config)
    dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["w"], torch.arange(8 * 16384.0).view(8, 16384))
    assert state["b"].sum() == 100 and state["step"] == 7
    if number % 5 == 0:  # the others are only dropped
        reader.close()
"""


Check = Callable[[str, int, int], None]


@pytest.fixture
def check_that_nothing_grows(warm_interpreter: WarmInterpreter, tmp_path: Path) -> Check:
    """Check what a process holds more after some loads than it did after the first."""

    def check(program: str, warm_up: int, loads: int) -> None:
        file = tmp_path / "program.py"
        file.write_text(LEAKS % program)
        done = warm_interpreter.run(file, str(warm_up), str(loads))
        assert (done.returncode, done.stderr) == (0, "")
        assert_nothing_grew(json.loads(done.stdout))

    return check


def assert_nothing_grew(grown: dict[str, int]) -> None:
    for name in ("descriptors", "threads", "processes"):
        assert grown[name] <= 0, grown
    assert grown["mappings"] < 10, grown
    assert grown["objects"] < 300, grown
    # Less than what the loads have held, 0.5 MiB each. A thread that a busy machine needs more has memory of its own.
    assert grown["bytes"] < 8 * MiB, grown


def test_80_fetches_in_a_row_leave_nothing_behind(server: FaultServer, check_that_nothing_grows: Check) -> None:
    check_that_nothing_grows(FETCHES.format(url=server.url("/object")), 20, 60)


def test_40_loads_in_a_row_leave_nothing_behind(bucket: str, check_that_nothing_grows: Check) -> None:
    state = {"w": torch.arange(8 * 16384.0).view(8, 16384), "b": torch.ones(100), "step": 7}
    uri = f"s3://{bucket}/checkpoint"
    save(state, storage_writer=S3StorageWriter(REGION, uri))
    check_that_nothing_grows(LOADS.format(uri=uri), 15, 25)


# -- many processes at one time

PROCESS = """
import hashlib, sys
from mpreader import PoolConfig, RangeFetcher
url, size = sys.argv[1], int(sys.argv[2])
config = PoolConfig(workers=1, connections_per_worker=4, max_memory=4 << 20, part_size=128 << 10)
with RangeFetcher(pool_config=config) as fetcher:
    fetcher.fetch(url, [(0, 1)])
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(3):
        digest = hashlib.md5()
        for _, view in fetcher.stream(url, [(start, start + 65536) for start in range(0, size, 65536)]):
            digest.update(view)
        print(digest.hexdigest())
"""


def test_8_processes_at_once_load_what_is_theirs(data: bytes) -> None:
    size = 4 * MiB
    contents = {f"/object{number}": data[number * 1000 :][:size] for number in range(8)}
    with FaultServer(contents) as server:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, server.url(path), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for path in contents
        ]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            results = [process.communicate(timeout=80) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    for content, (out, err) in zip(contents.values(), results, strict=True):
        assert (out.split(), err) == ([hashlib.md5(content).hexdigest()] * 3, "")
