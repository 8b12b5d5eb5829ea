"""``mpreader load --ranks`` as a user calls it: what it says of the host is what the server was asked for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import S3FileSystem, S3StorageWriter, describe_checkpoint
from mpreader.pool.stats import PoolStats, WorkerStats
from mpreader.testing import Fault, FaultKind, FaultServer, S3Server
from mpreader.tools.bench.counts import counts_of
from mpreader.tools.ranks.job import HostLoad
from mpreader.tools.ranks.messages import RankLoad

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(run_here: Run) -> Run:
    return partial(run_here, "load")


def example() -> dict[str, Any]:
    """Tensors that three ranks divide evenly, unevenly and not at all, and an item that nobody can unpickle."""
    return {
        "large": torch.rand(999, 1024),
        "odd": torch.rand(511, 700).to(torch.bfloat16),
        "few": torch.ones(2, 30_000),
        "flat": torch.arange(100_000),
        "scalar": torch.tensor(1.5),
        "step": Foreign(),
    }


class Foreign:
    """Nothing that another process could make."""


@pytest.fixture
def checkpoint(bucket: str) -> str:
    uri = f"s3://{bucket}/run"
    save(example(), storage_writer=S3StorageWriter(None, uri, thread_count=2))
    return uri


def asked(server: S3Server, before: int) -> int:
    """Returns how many bytes of files of tensors were asked for, by requests after the first ones."""
    ranges = [request.range or "" for request in server.requests[before:] if request.path.endswith(".distcp")]
    borders = [re.fullmatch(r"bytes=(\d+)-(\d+)", one) for one in ranges]
    return sum(int(border[2]) + 1 - int(border[1]) for border in borders if border)


def check_asked(server: S3Server, before: int, loads: list[dict[str, Any]]) -> None:
    """What loads received is what the server was asked for; the rest of a request that was cut, for a second time."""
    received, was_asked = sum(load["received_nbytes"] for load in loads), asked(server, before)
    if any(rank["slow_cut"] for load in loads for rank in load["ranks"]):  # by a busy machine
        assert received <= was_asked
    else:
        assert received == was_asked


def test_ranks_that_all_load_everything_receive_it_once(
    checkpoint: str, s3_server: S3Server, tmp_path: Path, run: Run
) -> None:
    before = len(s3_server.requests)
    done = run(checkpoint, "--ranks", "3", "--repeat", "2", "--json", "--timeline", tmp_path / "host.json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    loads = document["loads"]
    assert (document["ranks"], document["shard"], document["is_shared"], document["is_verified"]) == (
        3,
        None,
        True,
        True,
    )
    assert [load["starts_workers"] for load in loads] == [True, False]
    check_asked(s3_server, before, loads)
    nbytes = sum(value.nbytes for value in example().values() if isinstance(value, torch.Tensor))
    for load in loads:
        assert load["needed_nbytes"] == nbytes
        assert load["received_per_needed"] == load["received_nbytes"] / nbytes < 1.01
        assert load["extra_memory_bytes"] > 0  # worker processes, at least
        first, *others = load["ranks"]
        assert [rank["rank"] for rank in load["ranks"]] == [0, 1, 2]
        assert {rank["nbytes"] for rank in load["ranks"]} == {nbytes}
        assert (first["received_nbytes"], first["shared_nbytes"]) == (load["received_nbytes"], 0)
        assert {(rank["received_nbytes"], rank["shared_nbytes"]) for rank in others} == {(0, load["received_nbytes"])}
        assert {rank["verified_nbytes"] for rank in load["ranks"]} == {load["received_nbytes"]}
    events = json.loads((tmp_path / "host.json").read_text())["traceEvents"]
    recorded = [event["args"] for event in events if event.get("args", {}).get("uri", "").endswith(".distcp")]
    assert len(recorded) == sum(rank["requests"] for load in loads for rank in load["ranks"])


def test_ranks_in_shards_receive_what_inspect_says(checkpoint: str, s3_server: S3Server, run: Run) -> None:
    summary = describe_checkpoint(checkpoint, ranks=3, shard=0).sharded
    assert summary is not None
    assert summary.host is not None
    for option, fetched in (("--json", summary.host.fetched_nbytes), ("--no-share", summary.fetched_nbytes)):
        before = len(s3_server.requests)
        document = json.loads(run(checkpoint, "--ranks", "3", "--shard", "0", "--json", option).stdout)
        [load] = document["loads"]
        assert document["is_shared"] is (option == "--json")
        assert load["received_nbytes"] == fetched
        check_asked(s3_server, before, [load])
        assert load["needed_nbytes"] == summary.host.nbytes
        assert [rank["nbytes"] for rank in load["ranks"]] == [rank.nbytes for rank in summary.ranks]


def test_load_by_ranks_prints_a_row_for_each_and_what_the_host_received(checkpoint: str, run: Run) -> None:
    done = run(checkpoint, "--ranks", "2", "--shard", "1", "--verify-whole", "--match", "[lof]*")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{checkpoint}: 5.85 MB of tensors; each of 2 ranks has a shard of each in dimension 1; verified"
    assert [line.split()[:2] for line in lines[3:5]] == [["1", "0"], ["1", "1"]]
    assert lines[6] == "This host:"
    assert re.match(r"1, starts workers +\d+\.\d\d +5\.85 MB +5\.85 MB +1\.00 ", lines[8])


def test_load_by_one_rank_says_what_was_not_verified(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counts_of(PoolStats(over_read=1, unverified_bytes=11, workers=(WorkerStats(11, 1, 1.0),)))
    rank = RankLoad(rank=0, seconds=1.0, nbytes=10, shared_nbytes=0, **counts)
    load = HostLoad(True, 1.0, 10, 11, 7, (rank,))
    monkeypatch.setattr("mpreader.tools.ranks.job.time_rank_loads", lambda *_: [load])
    alone = run("s3://bucket/run", "--ranks", "1", "--no-verify").stdout.splitlines()
    assert alone[0] == "s3://bucket/run: 10 B of tensors; 1 rank has all of them; not verified"


def test_load_by_ranks_refuses_what_makes_no_sense_before_any_request(
    checkpoint: str, s3_server: S3Server, run: Run
) -> None:
    before = len(s3_server.requests)
    for arguments in (["--shard", "0"], ["--no-share"], ["--verify-whole"], ["--ranks", "0"]):
        assert run(checkpoint, *arguments).returncode == 2
    assert run(checkpoint, "--ranks", "2", "--no-verify", "--verify-whole").returncode == 2
    assert len(s3_server.requests) == before
    missing = run(f"{checkpoint}/missing", "--ranks", "2")
    assert (missing.returncode, missing.stdout, len(missing.stderr.splitlines())) == (3, "", 1)


def test_load_by_ranks_of_a_damaged_checkpoint_ends_in_one_line(checkpoint: str, run: Run) -> None:
    files = S3FileSystem()
    for name in ("__0_0.distcp", "__0_1.distcp"):
        with files.create_stream(f"{checkpoint}/{name}", "rb") as stream:
            data = bytearray(stream.read())
        data[len(data) // 2] ^= 1
        with files.create_stream(f"{checkpoint}/{name}", "wb") as stream:
            stream.write(data)
    files.close()
    done = run(checkpoint, "--ranks", "2")
    assert (done.returncode, done.stdout) == (5, "")
    assert f"is damaged in {checkpoint}/__0_" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- ranks that end, and a command that is ended


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell are born without it
from mpreader.cli.main import main
main()
"""


class Command(NamedTuple):
    """A command that waits for a server.

    Attributes:
        pid: Its process id.
        ranks: Those of its ranks.
        ended: Its end.
    """

    pid: int
    ranks: list[int]
    ended: Future[subprocess.CompletedProcess[str]]

    def said(self) -> tuple[int, str, str]:
        """Returns the exit code, and what was printed, of a command that is about to end."""
        done = self.ended.result(timeout=30)
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def hanging(
    tmp_path: Path, aws_environment: None, monkeypatch: pytest.MonkeyPatch, warm_interpreter: WarmInterpreter
) -> Iterator[Command]:
    """The command on a server that sends no tensor to its end, once all of its ranks wait."""
    save({"weight": torch.ones(1000, 1000)}, storage_writer=FileSystemWriter(tmp_path / "checkpoint"))
    objects = {f"/bucket/run/{file.name}": file.read_bytes() for file in (tmp_path / "checkpoint").iterdir()}
    stall = Fault(FaultKind.STALL, path="/bucket/run/__0_0.distcp", after_bytes=1000, seconds=600)
    script = tmp_path / "mpreader"
    script.write_text(PROGRAM)
    with FaultServer(objects, [stall]) as server, ThreadPoolExecutor(1) as threads:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        ended = threads.submit(warm_interpreter.run, script, "load", "s3://bucket/run", "--ranks", "3", "--no-share")
        try:
            requests = server.requests
            while not any(request.fault for request in requests):
                server.wait_for_requests(len(requests) + 1)
                requests = server.requests
            [pid] = children_of(warm_interpreter.pid)
            yield Command(pid, ranks_of(pid), ended)
        finally:
            for pid in children_of(warm_interpreter.pid):
                os.kill(pid, signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(pid: int) -> list[int]:
    """Process ids of the ranks of a command, in the order of the ranks."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children_of(pid)}
    [launcher] = [child for child, command in commands.items() if b"mpreader.tools.ranks.launcher" in command]
    return children_of(launcher)


def test_a_rank_that_is_killed_ends_the_load_in_one_line(hanging: Command) -> None:
    os.kill(hanging.ranks[1], signal.SIGKILL)
    error = "mpreader: rank 1 has ended without a word: SIGKILL, as where memory is used up\n"
    assert hanging.said() == (1, "", error)


def test_ctrl_c_ends_all_ranks(hanging: Command) -> None:
    os.kill(hanging.pid, signal.SIGINT)
    code, out, err = hanging.said()
    assert (code, out, err.strip()) == (130, "", "mpreader: interrupted")


def test_ranks_end_with_a_command_that_is_killed(hanging: Command) -> None:
    os.kill(hanging.pid, signal.SIGKILL)
    assert hanging.said() == (-signal.SIGKILL, "", "")
    # That nothing is left is what every test checks.
