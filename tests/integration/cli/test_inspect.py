"""``mpreader inspect`` as a user calls it: what it prints is what the checkpoint holds and what a load requests."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import PoolConfig, S3ReaderConstructor
from mpreader.cli.main import main
from mpreader.config import KiB, MiB
from mpreader.dcp import (
    CheckpointSummary,
    S3FileSystem,
    S3StorageReader,
    S3StorageWriter,
    describe_checkpoint,
    load_checkpoint,
)
from mpreader.errors import ConfigError
from mpreader.testing import FaultedRequest, FaultServer, S3Server
from tests.integration.dcp.test_sharded_jobs import JOBS, PRELOAD

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=256 * KiB)
ROWS = 100  # of a shard


def example() -> dict[str, Any]:
    """Several sizes, some of them larger than a part, three larger than any gap that is worth reading over."""
    return {
        "small": {f"{number}": torch.full((1000 + number,), number) for number in range(30)},
        "medium": {f"{number}": torch.full((60_000,), number, dtype=torch.bfloat16) for number in range(9)},
        "large": [torch.arange(150_001), *(torch.arange(320_000) + number for number in range(3))],
        "sharded": torch.arange(950 * 60, dtype=torch.float32).reshape(950, 60),
        "odd": {
            "scalar": torch.tensor(1.5),
            "empty": torch.empty(0, 7),
            "transposed": torch.arange(6000).reshape(60, 100).t(),
            "slice": torch.arange(40_000)[::4],
        },
        "step": 3,
        "names": ["a", "b"],
    }


class Sharding(DefaultSavePlanner):
    """Saves what has two dimensions in shards of :data:`ROWS` rows, as ranks do that share it."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=[shard for item in plan.items for shard in _shards(item)])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        offsets, data = write_item.index.offset, write_item.tensor_data
        if offsets is None or data is None or write_item.type != WriteItemType.SHARD:
            return super().resolve_data(write_item)
        whole = self.lookup_object(MetadataIndex(write_item.index.fqn))
        return whole.narrow(0, offsets[0], data.chunk.sizes[0])


def _shards(item: WriteItem) -> list[WriteItem]:
    data = item.tensor_data
    if data is None or len(data.size) != 2 or not data.size[0]:
        return [item]
    shards = []
    for start in range(0, data.size[0], ROWS):
        offsets = torch.Size([start, 0])
        chunk = ChunkStorageMetadata(offsets, torch.Size([min(ROWS, data.size[0] - start), data.size[1]]))
        index = MetadataIndex(item.index.fqn, offsets)
        shards.append(WriteItem(index, WriteItemType.SHARD, tensor_data=dataclasses.replace(data, chunk=chunk)))
    return shards


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of a checkpoint of :func:`example` in three files; shards of one tensor are in several of them."""
    uri = f"s3://{bucket}/runs/one"
    save(example(), storage_writer=S3StorageWriter("us-east-1", uri, thread_count=3), planner=Sharding())
    return uri


def asked_for(server: S3Server, before: int, uri: str) -> dict[str, list[tuple[str, str | None]]]:
    """Files and ranges that were asked for since there were ``before`` requests, by method; sorted, with repeats."""
    asked: dict[str, list[tuple[str, str | None]]] = {"GET": [], "HEAD": []}
    for request in server.requests[before:]:
        asked[request.method].append((request.path.removeprefix(uri.removeprefix("s3:/") + "/"), request.range))
    return {method: sorted(requests) for method, requests in asked.items()}


def planned(summary: CheckpointSummary) -> dict[str, list[tuple[str, str | None]]]:
    """The same as it was said beforehand."""
    files = summary.load.files
    gets = [(file.path, f"bytes={part.start}-{part.end - 1}") for file in files for part in file.parts]
    gets += [(".metadata", "bytes=0-")] * summary.load.metadata_requests
    heads = [(file.path, None) for file in files if file.parts]
    assert len(heads) == summary.load.head_requests
    assert len(gets) == summary.load.requests + summary.load.metadata_requests
    return {"GET": sorted(gets), "HEAD": sorted(heads)}


@pytest.mark.usefixtures("_asked_once")
@pytest.mark.parametrize("max_gap_size", [0, 32 * MiB])
@pytest.mark.parametrize(
    "match", [None, "small.*[0347]", ("odd.*", "medium.*", "large.0", "step", "names", "sharded"), "names"]
)
def test_inspect_tells_exactly_what_a_load_asks_for(
    checkpoint: str, s3_server: S3Server, match: Any, max_gap_size: int
) -> None:
    summary = describe_checkpoint(checkpoint, pool_config=POOL, max_gap_size=max_gap_size, match=match)
    before = len(s3_server.requests)
    load_checkpoint(checkpoint, pool_config=POOL, max_gap_size=max_gap_size, match=match)
    assert asked_for(s3_server, before, checkpoint) == planned(summary)


def test_the_plans_that_are_compared_have_gaps_and_over_read_and_cut_tensors(checkpoint: str) -> None:
    some = describe_checkpoint(checkpoint, pool_config=POOL, match="small.*[0347]").load
    assert some.over_read_nbytes > 0
    assert some.requests < some.tensors
    apart = describe_checkpoint(
        checkpoint, pool_config=POOL, match=("odd.*", "medium.*", "large.0", "step", "names")
    ).load
    assert max(file.groups for file in apart.files) > 1
    assert apart.requests > apart.groups
    assert describe_checkpoint(checkpoint, pool_config=POOL, max_gap_size=0).load.over_read_nbytes == 0


@pytest.mark.usefixtures("_asked_once")
@pytest.mark.parametrize(("max_gap_size", "part_size"), [(32 * MiB, 256 * KiB), (64 * KiB, 64 * KiB), (0, 8 * MiB)])
def test_inspect_tells_exactly_what_dcps_own_load_asks_for(
    checkpoint: str, s3_server: S3Server, max_gap_size: int, part_size: int
) -> None:
    pool = dataclasses.replace(POOL, max_memory=128 * MiB, part_size=part_size)
    match = ("small.*[13579]", "large.0", "sharded")
    summary = describe_checkpoint(checkpoint, pool_config=pool, max_gap_size=max_gap_size, match=match)
    assert next(len(tensor.files) for tensor in summary.tensors if tensor.fqn == "sharded") > 1
    expected = example()
    state: dict[str, Any] = {
        "small": {name: torch.zeros_like(value) for name, value in expected["small"].items() if int(name) % 2},
        "large": [torch.zeros(150_001, dtype=torch.int64)],
        "sharded": torch.zeros(950, 60),
    }
    constructor = S3ReaderConstructor.multiprocess(max_gap_size, pool_config=pool)
    before = len(s3_server.requests)
    with S3StorageReader(None, checkpoint, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
        stats = reader.stats
    assert asked_for(s3_server, before, checkpoint) == planned(summary)
    assert (stats.bytes, stats.over_read, stats.requests) == (
        summary.load.fetched_nbytes,
        summary.load.over_read_nbytes,
        summary.load.requests,
    )
    assert torch.equal(state["sharded"], expected["sharded"])
    assert torch.equal(state["large"][0], expected["large"][0])


LOADS = """
from torch.distributed.tensor import Replicate, distribute_tensor
from mpreader import S3ClientConfig

dim, sizes, urls = int(sys.argv[3]), eval(sys.argv[4]), sys.argv[5:]

def load_all():
    own, first = (
        S3ClientConfig(endpoint_url=url, force_path_style=True) for url in (urls[dist.get_rank()], urls[0])
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {
        name: distribute_tensor(torch.zeros(size), mesh, [Shard(dim) if dim < len(size) else Replicate()])
        for name, size in sizes.items()
    }
    pool = PoolConfig(workers=1, connections_per_worker=1, max_memory=16 * 2**20, part_size=2**18)
    for path, client, share_host in (("s3://bucket/run", own, False), ("s3://bucket/shared", first, True)):
        with S3StorageReader(None, path, client, pool_config=pool, share_host=share_host) as reader:
            dcp.load(state, storage_reader=reader)

run_job(len(urls), load_all)
"""


def asked_of_tensors(log: Sequence[FaultedRequest], prefix: str) -> tuple[int, int]:
    """GETs of a log for the files of tensors whose paths begin so, and the bytes that they asked for."""
    gets = [
        request
        for request in log
        if request.method == "GET" and request.path.startswith(prefix) and request.path.endswith(".distcp")
    ]
    ranges = [re.findall(r"\d+", request.range or "") for request in gets]
    return len(gets), sum(int(end) + 1 - int(start) for start, end in ranges)


SIZES = {"large": (2048, 1024), "odd": (1021, 1031), "deep": (64, 32, 100), "flat": (100,), "few": (3, 1000)}


@pytest.mark.parametrize(("ranks", "dim"), [(4, 0), (3, 1)])
def test_inspect_tells_exactly_what_each_rank_and_a_host_of_all_ask_for(
    tmp_path: Path,
    aws_environment: None,
    monkeypatch: pytest.MonkeyPatch,
    warm_interpreter: WarmInterpreter,
    ranks: int,
    dim: int,
) -> None:
    checkpoint, script = tmp_path / "checkpoint", tmp_path / "job.py"
    save({name: torch.ones(size) for name, size in SIZES.items()}, storage_writer=FileSystemWriter(checkpoint))
    script.write_text(JOBS + LOADS)
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    objects = {f"/bucket/{run}/{name}": data for run in ("run", "shared") for name, data in files.items()}
    with ExitStack() as stack:
        # Each rank has a server of its own, and so a log of its own. With a single connection, no request is divided;
        # since none is cut either, the log has the plan's requests and no others.
        servers = [stack.enter_context(FaultServer(objects)) for _ in range(ranks)]
        for name, value in servers[0].environment().items():
            monkeypatch.setenv(name, value)
        summary = describe_checkpoint(
            "s3://bucket/run", pool_config=dataclasses.replace(POOL, part_size=256 * KiB), ranks=ranks, shard=dim
        ).sharded
        before = len(servers[0].requests)
        urls = [server.endpoint_url for server in servers]
        done = warm_interpreter.run(script, "", tmp_path, f"{dim}", repr(SIZES), *urls, preload=PRELOAD)
        assert done.returncode == 0, done.stderr
        logs = [server.requests for server in servers]
    del logs[0][:before]
    assert summary is not None
    for rank, log in zip(summary.ranks, logs, strict=True):
        assert (rank.requests, rank.fetched_nbytes) == asked_of_tensors(log, "/bucket/run/")
        assert rank.requests > 3
    whole = sum(map(len, files.values()))
    assert summary.host is not None
    assert summary.host.nbytes == 4 * sum(math.prod(size) for size in SIZES.values())
    assert summary.host.nbytes < summary.host.fetched_nbytes <= whole
    assert (summary.host.requests, summary.host.fetched_nbytes) == asked_of_tensors(logs[0], "/bucket/shared/")
    assert summary.fetched_nbytes < (1.1 * whole if dim == 0 else ranks * whole)


# -- the command


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process, which has torch already."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", *arguments])
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return run


def test_inspect_is_a_command(checkpoint: str, warm_interpreter: WarmInterpreter) -> None:
    shown = warm_interpreter.run("mpreader", "inspect", checkpoint, module="mpreader", is_strict=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{checkpoint}: 48 tensors of ")


def test_inspect_prints_tables(checkpoint: str, run: Run) -> None:
    shown = run(checkpoint, "--limit", "3", "--sort", "size", "--part-size", "256KiB")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{checkpoint}: 48 tensors of ")
    assert "2 other items" in shown.stdout.splitlines()[0]
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith("large.")]
    assert [row[:5] for row in rows] == [[f"large.{number}", "int64", "320000", "2.56", "MB"] for number in (1, 2, 3)]
    assert "… and 45 more (--limit 0 shows all)" in shown.stdout
    load = describe_checkpoint(checkpoint, pool_config=PoolConfig(part_size=256 * KiB)).load
    assert f"in {load.requests} GETs of at most 262 kB" in shown.stdout
    assert "3 HEADs, and 1 GET of .metadata" in shown.stdout
    everything = run(checkpoint, "--limit", "0").stdout
    assert "more (--limit" not in everything
    assert "medium.8 " in everything


def test_inspect_shows_what_matches_with_its_parts(checkpoint: str, run: Run) -> None:
    shown = run(checkpoint, "--match", "medium.[12]", "--match", "step", "--part-size", "64KiB", "--parts").stdout
    assert "A load of what matches medium.[12] or step, 2 tensors and 1 other item" in shown
    assert "medium.1 " in shown
    assert "medium.3 " not in shown
    load = describe_checkpoint(
        checkpoint, match=["medium.[12]", "step"], pool_config=PoolConfig(part_size=64 * KiB)
    ).load
    for file in load.files:
        for part in file.parts:
            assert any(
                line.split()[:4] == [file.path, f"{part.start:,}", f"{part.end:,}", f"{part.size:,}"]
                for line in shown.splitlines()
            )


def test_inspect_plans_a_load_in_shards(checkpoint: str, run: Run) -> None:
    shown = run(checkpoint, "--ranks", "4", "--shard", "0", "--limit", "3", "--match", "large.*").stdout
    sharded = describe_checkpoint(checkpoint, match="large.*", ranks=4).sharded
    assert sharded is not None
    assert sharded.nbytes == 8 * (150_001 + 3 * 320_000)
    assert sum(rank.nbytes for rank in sharded.ranks) == sharded.nbytes
    assert sharded.nbytes < sharded.fetched_nbytes < 1.05 * sharded.nbytes
    assert "A load by 4 ranks, each with a shard of every tensor in dimension 0, needs 8.88 MB" in shown
    assert sharded.host is not None
    assert sharded.host.nbytes == sharded.nbytes < sharded.host.fetched_nbytes < 1.01 * sharded.nbytes
    assert "If all of them are on one host, they receive together what they need: 8.88 MB, of which" in shown
    row = ["1", f"{sharded.ranks[1].requests}", "2.22", "MB", "2.23", "MB"]
    assert row in [line.split()[:6] for line in shown.splitlines()]
    document = json.loads(run(checkpoint, "--json", "--ranks", "2", "--shard", "1").stdout)
    assert [rank["rank"] for rank in document["sharded"]["ranks"]] == [0, 1]


def test_inspect_refuses_no_ranks(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="at least one rank and dimension 0, got 0 and 0"):
        describe_checkpoint(checkpoint, ranks=0)


def test_inspect_prints_json_with_parts_only_where_they_are_asked_for(checkpoint: str, run: Run) -> None:
    document = json.loads(run(checkpoint, "--json", "--parts", "--match", "odd.*").stdout)
    load = describe_checkpoint(checkpoint, match="odd.*").load
    assert [[(part["start"], part["end"]) for part in file["parts"]] for file in document["load"]["files"]] == [
        [(part.start, part.end) for part in file.parts] for file in load.files
    ]
    without = json.loads(run(checkpoint, "--json", "--match", "odd.*").stdout)
    for file in document["load"]["files"]:
        del file["parts"]
    assert without == document


def test_inspect_of_no_checkpoint_says_what_is_there_instead(checkpoint: str, bucket: str, run: Run) -> None:
    files = S3FileSystem()
    for name in ("other/half/__0_0.distcp", "other/broken/.metadata"):
        with files.create_stream(f"s3://{bucket}/{name}", "wb") as stream:
            stream.write(b"no pickle")
    files.close()
    for place, code, message in (
        ("missing", 3, "the bucket exists, but has no such key .*; nothing is there$"),
        ("runs", 3, f"there are checkpoints at {checkpoint}$"),
        ("", 3, f"there are checkpoints at s3://{bucket}/other/broken, {checkpoint}$"),
        ("runs/one/.metadata", 3, f"{checkpoint}/.metadata is a file: name the folder"),
        ("other/half", 3, "there are files, but no .metadata: it was not saved to its end"),
        ("other/broken", 2, "the checkpoint's .metadata is damaged"),
    ):
        shown = run(f"s3://{bucket}/{place}")
        assert (shown.returncode, shown.stdout, len(shown.stderr.splitlines())) == (code, "", 1)
        assert re.search(message, shown.stderr), shown.stderr
    assert json.loads(run(f"s3://{bucket}/missing", "--json").stdout)["error"]["type"] == "ObjectMissing"
    nowhere = run("s3://no-such-bucket-here/checkpoint")
    assert (nowhere.returncode, "there is no such bucket" in nowhere.stderr) == (3, True)
    local = run("/checkpoint")
    assert (local.returncode, local.stderr) == (3, "mpreader: /checkpoint: there is no such file or directory\n")
