"""Loads of other shards than those that were saved: the bytes that the server is asked for, and what is loaded."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ObjectChanged, PoolConfig
from mpreader.config import KiB, MiB
from mpreader.dcp import S3FileSystem, S3StorageReader, S3StorageWriter, describe_checkpoint
from mpreader.errors import ConfigError
from mpreader.pool.stats import PoolStats
from mpreader.readers.multiprocess_constructor import MultiprocessConstructor
from mpreader.testing import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=1 * MiB)


class Served(NamedTuple):
    """What the server was asked for: bytes of the GETs of files, and the number of HEADs.

    On a busy machine more bytes are asked for than received: requests that are slow end early, and others ask for the
    rest. So the bytes that were received are compared with what is needed, and these with those.
    """

    nbytes: int
    heads: int


def served(server: S3Server, before: int) -> Served:
    requests = [request for request in server.requests[before:] if not request.path.endswith(".metadata")]
    ranges = [request.range or "" for request in requests if request.method == "GET"]
    borders = [re.fullmatch(r"bytes=(\d+)-(\d+)", one) for one in ranges]
    assert all(borders)
    nbytes = sum(int(border[2]) + 1 - int(border[1]) for border in borders if border)
    return Served(nbytes, sum(request.method == "HEAD" for request in requests))


class Narrowing(DefaultLoadPlanner):
    """Loads of every tensor the box that ``narrow`` makes of its shape, as a rank does that has a shard of it."""

    def __init__(self, narrow: Callable[[str, torch.Size], tuple[Sequence[int], Sequence[int]]]) -> None:
        super().__init__()
        self._narrow = narrow

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[self._box(item) for item in plan.items])

    def _box(self, item: ReadItem) -> ReadItem:
        offsets, lengths = self._narrow(item.storage_index.fqn, item.lengths)
        at = torch.Size(offsets)
        return dataclasses.replace(item, dest_offsets=at, storage_offsets=at, lengths=torch.Size(lengths))


def rows(start: int, count: int) -> Narrowing:
    return Narrowing(lambda _, size: ((start, *[0] * (len(size) - 1)), (count, *size[1:])))


def load_boxes(
    uri: str, expected: dict[str, torch.Tensor], planner: Narrowing, **options: Any
) -> tuple[dict[str, torch.Tensor], PoolStats]:
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in expected.items()}
    with S3StorageReader(None, uri, pool_config=POOL, **options) as reader:
        load(state, storage_reader=reader, planner=planner)
        return state, reader.stats


def numbered(*size: int) -> torch.Tensor:
    return torch.arange(torch.Size(size).numel(), dtype=torch.int32).reshape(size)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {f"layer{number}": numbered(1024, 1024) + number for number in range(3)}


@pytest.fixture
def checkpoint(bucket: str, tensors: dict[str, torch.Tensor]) -> str:
    uri = f"s3://{bucket}/whole"
    save(tensors, storage_writer=S3StorageWriter(None, uri))
    return uri


@pytest.mark.parametrize("quarter", range(4))
def test_rows_are_received_exactly_in_one_wave(
    checkpoint: str, tensors: dict[str, torch.Tensor], s3_server: S3Server, quarter: int
) -> None:
    before = len(s3_server.requests)
    state, stats = load_boxes(checkpoint, tensors, rows(256 * quarter, 256))
    asked = served(s3_server, before)
    needed = 3 * MiB
    assert needed <= stats.bytes <= 1.01 * needed
    assert stats.bytes <= asked.nbytes
    assert asked.heads == 1
    for name, value in tensors.items():
        assert torch.equal(state[name][256 * quarter : 256 * (quarter + 1)], value[256 * quarter : 256 * (quarter + 1)])
        assert state[name].count_nonzero() <= 256 * 1024
    assert (stats.verified_bytes, stats.unverified_bytes) == (0, needed)
    assert stats.over_read < 4 * KiB


def test_whole_items_beside_boxes_are_verified(
    checkpoint: str, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    one = Narrowing(lambda fqn, size: ((0, 0), (256 if fqn == "layer1" else 1024, size[1])))
    with caplog.at_level(logging.INFO, "mpreader"):
        state, stats = load_boxes(checkpoint, tensors, one)
    assert torch.equal(state["layer2"], tensors["layer2"])
    assert stats.unverified_bytes == MiB
    assert 8 * MiB < stats.verified_bytes < 8 * MiB + 4 * KiB
    assert f"{stats.verified_bytes} bytes were verified, {MiB} were not" in caplog.text


def test_verify_whole_receives_whole_items_and_checks_them(checkpoint: str, tensors: dict[str, torch.Tensor]) -> None:
    _, stats = load_boxes(checkpoint, tensors, rows(0, 256), verify="whole")
    assert stats.bytes > 12 * MiB
    assert (stats.verified_bytes, stats.unverified_bytes) == (stats.bytes, 0)
    _, stats = load_boxes(checkpoint, tensors, rows(0, 1024), verify=False)
    assert (stats.verified_bytes, stats.unverified_bytes) == (0, stats.bytes)


def test_verify_refuses_other_values(checkpoint: str) -> None:
    verify: Any = "all"
    with pytest.raises(ConfigError, match='verify must be True, False or "whole"'):
        S3StorageReader(None, checkpoint, verify=verify)


def test_items_that_are_not_stored_as_expected_are_read_again_all_at_once(bucket: str, s3_server: S3Server) -> None:
    uri = f"s3://{bucket}/odd"
    odd = {f"transposed{number}": (numbered(1000, 1000) + number).t() for number in range(4)}
    odd["plain"] = numbered(1000, 1000)
    odd["conjugated"] = torch.complex(torch.arange(1e6).reshape(1000, 1000), torch.ones(1000, 1000)).conj()
    save(odd, storage_writer=S3StorageWriter(None, uri))
    before = len(s3_server.requests)
    state, stats = load_boxes(uri, odd, rows(100, 100))
    for name, value in odd.items():
        assert torch.equal(state[name][100:200], value[100:200]), name
    asked = served(s3_server, before)
    assert asked.heads == 1  # what is read again is of the version that was read first
    assert stats.bytes <= asked.nbytes


@pytest.mark.row("a box of a tensor: overwritten before what was not predicted is read")
def test_version_that_was_read_first_is_the_one_that_is_read_again(bucket: str) -> None:
    uri = f"s3://{bucket}/changing"
    stored = {"transposed": numbered(1000, 1000).t()}
    save(stored, storage_writer=S3StorageWriter(None, uri))

    def overwrite() -> None:
        file = f"{uri}/__0_0.distcp"
        with S3FileSystem().create_stream(file, "rb") as stream:
            content = bytes(stream.read())
        with S3FileSystem().create_stream(file, "wb") as stream:
            stream.write(content[:-1] + b"\1")

    class Overwritten(MultiprocessConstructor):
        """Overwrites the file between the two waves."""

        def set_ranges_by_file(self, *arguments: Any, continues: bool = False) -> None:
            if continues:
                overwrite()
            super().set_ranges_by_file(*arguments, continues=continues)

    state = {"transposed": torch.zeros(1000, 1000, dtype=torch.int32)}
    constructor = Overwritten(pool_config=POOL)
    with (
        S3StorageReader(None, uri, reader_constructor=constructor) as reader,
        pytest.raises(CheckpointException) as raised,
    ):
        load(state, storage_reader=reader, planner=rows(100, 100))
    [(error, _)] = raised.value.failures.values()
    assert isinstance(error, ObjectChanged)


class SeveralBoxes(Narrowing):
    """Loads several boxes of every tensor."""

    def __init__(self, *boxes: tuple[Sequence[int], Sequence[int]]) -> None:
        super().__init__(lambda *_: boxes[0])
        self._boxes = boxes

    def create_local_plan(self) -> LoadPlan:
        plan = DefaultLoadPlanner.create_local_plan(self)
        items = [
            dataclasses.replace(item, dest_offsets=at, storage_offsets=at, lengths=torch.Size(lengths))
            for item in plan.items
            for at, lengths in ((torch.Size(offsets), lengths) for offsets, lengths in self._boxes)
        ]
        return dataclasses.replace(plan, items=items)


@pytest.mark.parametrize(
    ("boxes", "most_mib"),
    [
        ([((0, 0), (8, MiB)), ((0, 2 * MiB), (8, MiB))], 65),  # of each row a run of one box, then one of the other
        ([((0, 0), (2, 4 * MiB)), ((1, 0), (2, 4 * MiB))], 65),  # one row in both
        ([((0, 0), (4, 4 * MiB)), ((4, 0), (4, 4 * MiB))], 257),  # all of it, so that its checksum can be compared
    ],
    ids=["interleaved", "overlapping", "all"],
)
def test_several_boxes_of_an_item_that_is_larger_than_the_arena(
    bucket: str, boxes: list[tuple[Sequence[int], Sequence[int]]], most_mib: int
) -> None:
    uri = f"s3://{bucket}/several"
    stored = {"large": numbered(8, 4 * MiB)}  # 128 MiB
    save(stored, storage_writer=S3StorageWriter(None, uri))
    state, stats = load_boxes(uri, stored, SeveralBoxes(*boxes))
    expected = torch.zeros_like(stored["large"])
    for (row, column), (rows_, columns) in boxes:
        box = slice(row, row + rows_), slice(column, column + columns)
        expected[box] = stored["large"][box]
    assert torch.equal(state["large"], expected)
    assert stats.bytes <= most_mib * MiB
    assert bool(stats.verified_bytes) == (most_mib > 128)


class ChangesLate(Narrowing):
    """Changes the boxes of the plan, and which items it has, after the storage reader has seen the plan."""

    def __init__(self, offset: int, *, in_global_plan: bool) -> None:
        super().__init__(lambda _, size: ((256, 0), (256, size[1])))
        self._offset = offset
        self._in_global_plan = in_global_plan
        self._left_out: list[ReadItem] = []

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        self._left_out = [item for item in plan.items if item.storage_index.fqn == "layer2"]
        return dataclasses.replace(plan, items=[item for item in plan.items if item not in self._left_out])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        [plan] = super().create_global_plan(global_plan)
        return [self._change(plan) if self._in_global_plan else plan]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan if self._in_global_plan else self._change(central_plan)

    def _change(self, plan: LoadPlan) -> LoadPlan:
        at = torch.Size((self._offset, 0))
        changed = [
            dataclasses.replace(item, dest_offsets=at, storage_offsets=at)
            for item in [*self._left_out, *plan.items[::-1]]
        ]
        return dataclasses.replace(plan, items=changed)


@pytest.mark.parametrize("in_global_plan", [True, False])
@pytest.mark.parametrize("offset", [0, 256, 700])
def test_boxes_that_the_planner_changes_after_the_reads_have_begun_are_loaded(
    checkpoint: str, tensors: dict[str, torch.Tensor], offset: int, in_global_plan: bool
) -> None:
    state, stats = load_boxes(checkpoint, tensors, ChangesLate(offset, in_global_plan=in_global_plan))
    for name, value in tensors.items():
        assert torch.equal(state[name][offset : offset + 256], value[offset : offset + 256])
        assert state[name].count_nonzero() <= 256 * 1024
    # An item of the first plan is read once more only if another box of it is wanted.
    assert stats.bytes <= (7 if offset == 256 else 15) * MiB


def test_box_of_an_item_that_is_larger_than_the_arena(bucket: str) -> None:
    uri = f"s3://{bucket}/large"
    stored = {"large": numbered(8, 4 * MiB)}  # 128 MiB
    save(stored, storage_writer=S3StorageWriter(None, uri))
    columns = Narrowing(lambda _, size: ((0, MiB), (size[0], 2 * MiB)))
    state, stats = load_boxes(uri, stored, columns)
    assert torch.equal(state["large"][:, MiB : 3 * MiB], stored["large"][:, MiB : 3 * MiB])
    assert 64 * MiB <= stats.bytes <= 1.01 * 64 * MiB
    assert stats.unverified_bytes == 64 * MiB


JOB = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from mpreader import PoolConfig
from mpreader.dcp import S3StorageReader, S3StorageWriter

dist.init_process_group("gloo")
rank, uri = dist.get_rank(), sys.argv[1]
saving, loading = [eval(text) for text in sys.argv[2:4]]  # (shape of the mesh, placements)

def mesh_of(shape):
    count = torch.Size(shape).numel()
    return DeviceMesh("cpu", torch.arange(count).reshape(shape))

def tensors(mesh, placements, scale):
    state = {}
    for number, size in enumerate([(2048, 1024), (1021, 1031), (64, 32, 1000), (100,), (3, 1000)]):
        whole = torch.arange(torch.Size(size).numel(), dtype=torch.float32).reshape(size) + number
        fitting = [one if isinstance(one, Replicate) or one.dim < len(size) else Replicate() for one in placements]
        state[f"{number}"] = distribute_tensor(whole * scale, mesh, fitting)
    return state

meshes = [mesh_of(shape) for shape, _ in (saving, loading)]
states = []
for (shape, placements), mesh, scale in zip((saving, loading), meshes, (1, 0)):
    states.append(tensors(mesh, placements, scale) if rank < torch.Size(shape).numel() else None)
groups = [dist.new_group(list(range(torch.Size(shape).numel()))) for shape, _ in (saving, loading)]
if states[0] is not None:
    dcp.save(states[0], storage_writer=S3StorageWriter(None, uri), process_group=groups[0])
dist.barrier()
if states[1] is not None:
    pool = PoolConfig(max_memory=16 * 2**20, part_size=2**20)
    reader = S3StorageReader(None, uri, pool_config=pool, share_host=False)  # what is counted is one rank's own
    dcp.load(states[1], storage_reader=reader, process_group=groups[1])
    needed = 0
    for name, value in tensors(meshes[1], loading[1], 1).items():
        assert torch.equal(states[1][name].to_local(), value.to_local()), name
        needed += value.to_local().nbytes
    os.write(1, f"rank {rank} loaded {needed} {reader.stats.bytes}\\n".encode())
    reader.close()
dist.barrier()
os._exit(0)  # not destroy_process_group(): gloo of torch 2.13 aborts in about one of ten such exits
"""


@pytest.mark.parametrize(
    ("ranks", "saving", "loading", "at_most"),
    [
        (4, "(2,), [Shard(0)]", "(2, 2), [Replicate(), Shard(0)]", 1.05),
    ],
    ids=["to HSDP"],  # by torchrun; test_sharded_jobs.py has the others, whose ranks start in less time
)
def test_ranks_load_shards_of_what_others_saved(
    bucket: str, s3_server: S3Server, tmp_path: Path, ranks: int, saving: str, loading: str, at_most: float
) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    before = len(s3_server.requests)
    done = subprocess.run(
        [*command, f"s3://{bucket}/shards", saving, loading], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    loaded = [line.split() for line in done.stdout.splitlines() if line.startswith("rank")]
    needed, received = (sum(int(words[at]) for words in loaded) for at in (3, 4))
    asked = [request for request in s3_server.requests[before:] if request.range and request.range != "bytes=0-"]
    borders = [re.findall(r"\d+", request.range or "") for request in asked if ".metadata" not in request.path]
    # More where a request was slow and its rest was requested again, as may be on a busy machine.
    assert sum(int(end) + 1 - int(start) for start, end in borders) >= received
    assert received <= at_most * needed
    shard = re.fullmatch(r"\((\d),\), \[Shard\((\d)\)\]", loading)
    if shard:  # not for HSDP, which the inspection does not plan
        pool = PoolConfig(max_memory=16 * MiB, part_size=1 * MiB)
        summary = describe_checkpoint(
            f"s3://{bucket}/shards", pool_config=pool, ranks=int(shard[1]), shard=int(shard[2])
        ).sharded
        assert summary is not None
        by_rank = {int(words[1]): (int(words[3]), int(words[4])) for words in loaded}
        assert {rank.rank: rank.nbytes for rank in summary.ranks} == {rank: one[0] for rank, one in by_rank.items()}
        for rank in summary.ranks:
            # A request that ends early may receive a little of what another one asks for, too.
            assert rank.fetched_nbytes <= by_rank[rank.rank][1] <= 1.01 * rank.fetched_nbytes
        assert (summary.nbytes, sum(rank.fetched_nbytes for rank in summary.ranks)) == (needed, summary.fetched_nbytes)
