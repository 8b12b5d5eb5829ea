"""``mpreader bench`` as a user calls it: what it prints and draws is what it measured."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import PoolConfig, S3Client
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer, S3Server

if TYPE_CHECKING:
    from tests.integration.conftest import WorkersOf

_COMMAND = [sys.executable, "-m", "mpreader", "bench"]
_QUICK = ("--repeat", "1", "--workers", "1", "--connections", "2", "--part-size", "256KiB")


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of three objects of a prefix: 1 MiB, 512 KiB, and an empty one."""
    client = S3Client()
    for name, size in {"run/a": 512 * KiB, "run/b": MiB, "run/empty": 0}.items():
        with client.put_object(bucket, name) as writer:
            writer.write(secrets.token_bytes(size))
    client.close()
    return f"s3://{bucket}/run"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*_COMMAND, *arguments], capture_output=True, text=True, timeout=60)


def test_bench_tells_what_it_measured_as_json_and_draws_it(
    checkpoint: str, s3_server: S3Server, tmp_path: Path
) -> None:
    before = len(s3_server.requests)
    chart = tmp_path / "bench.png"
    options = ("--workers", "1,2", "--connections", "2", "--part-size", "256KiB,128KiB,256KiB", "--repeat", "2")
    done = run(checkpoint, *options, "--chart", str(chart), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert chart.read_bytes().startswith(b"\x89PNG\r\n")
    document = json.loads(done.stdout)
    assert (document["source"], document["objects"]) == (checkpoint, 2)
    sizes = ("source_bytes", "bytes_per_measurement", "bytes_asked_for")
    assert [document[name] for name in sizes] == [3 * 512 * KiB] * 3
    rounds = {each["name"]: each["results"] for each in document["rounds"]}
    assert list(rounds) == ["workers", "part size", "final round"]
    results = [each for results in rounds.values() for each in results]
    settings = {(each["workers"], each["connections_per_worker"], each["part_size"]) for each in results}
    chosen, usual = document["recommended"], document["defaults"]
    assert {(1, 2, 256 * KiB), (2, 2, 256 * KiB)} < settings
    assert settings & {(1, 2, 128 * KiB), (2, 2, 128 * KiB)}
    assert len(settings) == 4  # with the defaults
    assert chosen["environment"] == {
        "MPREADER_WORKERS": str(chosen["workers"]),
        "MPREADER_CONNECTIONS_PER_WORKER": str(chosen["connections_per_worker"]),
        "MPREADER_PART_SIZE": f"{chosen['part_size'] // KiB}KiB" if chosen["part_size"] % MiB else "8MiB",
    }
    assert document["best_gb_per_s"] == max(each["gb_per_s"] for each in rounds["final round"])
    assert document["defaults_are_fine"] is (usual["gb_per_s"] >= 0.97 * document["best_gb_per_s"])
    for each in results:
        check_result(each)
    # The server saw what the document says, and one calibration with the defaults.
    asked = Counter(size_of(each.range) for each in s3_server.requests[before:] if each.method == "GET" and each.range)
    for size in (128 * KiB, 256 * KiB):
        told = [one["requests"] for each in results if each["part_size"] == size for one in each["measurements"]]
        assert asked[size] == sum(told) > 0
    runs = 2 * sum(is_same(each, usual) for each in results) + 1
    assert asked[MiB] == asked[512 * KiB] == runs == 7


def check_result(each: dict[str, Any]) -> None:
    measurements = each["measurements"]
    assert len(measurements) >= 2
    for one in measurements:
        assert one["nbytes"] == 3 * 512 * KiB
        assert one["gb_per_s"] == pytest.approx(one["nbytes"] / one["seconds"] / 1e9)
        assert one["retries"] == 0
    rates = [one["gb_per_s"] for one in measurements]
    assert (each["min_gb_per_s"], each["max_gb_per_s"]) == (min(rates), max(rates))
    assert each["min_gb_per_s"] <= each["gb_per_s"] <= each["max_gb_per_s"]
    assert each["cpu_s_per_gb"] > 0
    assert each["memory_bytes"] > 0


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("workers", "connections_per_worker", "part_size"))


def size_of(header: str) -> int:
    start, end = map(int, header.removeprefix("bytes=").split("-"))
    return end - start + 1


def test_bench_prints_a_table_and_settings_to_copy(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_CONNECTIONS_PER_WORKER", "3")
    done = run(f"{checkpoint}/b", *_QUICK, "--bytes", "2560KiB")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        f"{checkpoint}/b: each measurement reads 2.62 MB",
        "the source has 1.05 MB: it is read 2.5 times, one after the other",
        "the defaults are those of your environment: MPREADER_CONNECTIONS_PER_WORKER",
    ]
    code = next(line.strip() for line in lines if "PoolConfig(" in line)
    config = eval(code, {"PoolConfig": PoolConfig})
    rows = [line.split() for line in lines[5:7]]
    variables = dict(pair.split("=") for pair in lines[lines.index(f"  {code}") + 1].split())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for field in ("workers", "connections_per_worker", "part_size"):
        assert PoolConfig().value(field) == getattr(config, field)
    recommended = next(row for row in rows if "recommended" in " ".join(row))
    assert recommended[1:3] == [str(config.workers), str(config.connections_per_worker)]
    assert rows[0][:4] == ["workers", "1", "2", "256KiB"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "0,x"), "0 is not in the range x>=1"),
        (("--connections", "4,x"), "'x' is not a valid integer range"),
        (("--part-size", "4MiB,"), "not a number of bytes: ''"),
        (("--part-size", "1KiB"), "part_size must be a whole number of at least 65536, got 1024"),
        (("--bytes", "0"), "nbytes must be at least 1, got 0"),
        (("--seconds", "0"), "0.0 is not in the range x>0"),
        (("--chart", "bench.pdf"), "--chart writes a .png, not bench.pdf"),
        (("--chart", "/nowhere/bench.png"), "/nowhere is no folder that you may write to"),
    ],
)
def test_bench_refuses_wrong_options_before_it_asks_anybody(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpreader.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["bench", "http://127.0.0.1:1/nobody", *options])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]


def test_bench_of_what_is_missing_or_empty_ends_in_one_line(checkpoint: str) -> None:
    missing = run(f"{checkpoint}/missing")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr.startswith(f"mpreader: {checkpoint}/missing: the bucket exists, but has no such key")
    empty = run(f"{checkpoint}/empty", "--json")
    assert (empty.returncode, empty.stderr) == (2, "")
    message = f"{checkpoint}/empty is empty: there is nothing to measure with"
    assert json.loads(empty.stdout)["error"] == {"type": "PlanError", "message": message}
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.row("Ctrl-C")
def test_ctrl_c_ends_a_bench_at_once_and_leaves_nothing(tmp_path: Path, workers_of: WorkersOf) -> None:
    with FaultServer({"/data": secrets.token_bytes(MiB)}) as server:
        server.inject(Fault(FaultKind.STALL, covering=200_000, seconds=3600))  # not what the warm-up reads
        chart = tmp_path / "bench.png"
        # A shell's background jobs are born without an ear for Ctrl-C.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from mpreader.cli.main import main; main()"
        arguments = (server.url("/data"), *_QUICK, "--seconds", "100", "--chart", str(chart))
        process = subprocess.Popen(
            [sys.executable, "-c", code, "bench", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MPREADER_WORKERS": "2", "MPREADER_CONNECTIONS_PER_WORKER": "1"},
        )
        try:
            deadline = time.monotonic() + 30
            while not any(each.fault for each in server.requests):
                server.wait_for_requests(len(server.requests) + 1, deadline - time.monotonic())
            workers = workers_of(process.pid)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        assert (process.returncode, out, err.strip()) == (130, "", "mpreader: interrupted")
        assert len(workers) == 2
        assert workers_of(process.pid) == []
        assert not chart.exists()
