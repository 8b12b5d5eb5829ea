"""``mpreader load`` as a user calls it: times, a timeline, and one line for each error."""

from __future__ import annotations

import json
import pickle
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import S3FileSystem, S3StorageWriter, describe_checkpoint
from mpreader.testing import S3Server

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of a checkpoint of two files, of which one item needs a class that only its author has."""
    uri = f"s3://{bucket}/runs/one"
    state = {
        "weights": [torch.full((100_000,), number, dtype=torch.float32) for number in range(6)],
        "bfloat16": torch.ones(1000, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 7),
        "step": Foreign(),
    }
    save(state, storage_writer=S3StorageWriter("us-east-1", uri, thread_count=2))
    return uri


class Foreign:
    """Nothing that another process could make."""


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(run_here: Run) -> Run:
    return partial(run_here, "load")


def rewrite(uri: str, change: Any) -> None:
    """Change what an object holds."""
    files = S3FileSystem()
    with files.create_stream(uri, "rb") as stream:
        data = change(stream.read())
    with files.create_stream(uri, "wb") as stream:
        stream.write(data)
    files.close()


def test_load_prints_a_row_for_each_load_and_nothing_else(checkpoint: str, warm_interpreter: WarmInterpreter) -> None:
    command = ["mpreader", "load", checkpoint, "--repeat", "2", "--workers", "1"]
    done = warm_interpreter.run(*command, module="mpreader", is_strict=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{checkpoint}: 2.4 MB of tensors, verified"
    assert lines[3].startswith("1, starts workers ")
    assert lines[4].startswith("2 ")


def test_load_tells_how_much_has_no_checksum(bucket: str, run: Run) -> None:
    uri = f"s3://{bucket}/unchecked"
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this torch saves checksums always")
    torch.serialization.set_crc32_options(False)
    try:
        save({"weight": torch.ones(250_000)}, storage_writer=S3StorageWriter(None, uri))
    finally:
        torch.serialization.set_crc32_options(True)
    first = run(uri).stdout.splitlines()[0]
    assert first.endswith("1 MB of tensors, 0 B of the items verified, 1 MB not: they were saved without checksums")
    assert run(uri, "--no-verify").stdout.splitlines()[0].endswith("1 MB of tensors, not verified")
    document = json.loads(run(uri, "--json").stdout)
    assert document["is_verified"] is False
    [load] = document["loads"]
    assert (load["verified_nbytes"], load["unverified_nbytes"]) == (0, load["received_nbytes"])


def test_load_tells_what_it_took_as_json(checkpoint: str, s3_server: S3Server, run: Run) -> None:
    before = len(s3_server.requests)
    done = run(checkpoint, "--repeat", "3", "--part-size", "64KiB", "--json", "--no-verify")
    document = json.loads(done.stdout)
    assert (document["uri"], document["is_verified"]) == (checkpoint, False)
    loads = document["loads"]
    assert [load["starts_workers"] for load in loads] == [True, False, False]
    gets = [request for request in s3_server.requests[before:] if request.path.endswith(".distcp")]
    assert sum(load["requests"] for load in loads) == sum(request.method == "GET" for request in gets)
    nbytes = describe_checkpoint(checkpoint).nbytes
    for load in loads:
        assert load["nbytes"] == nbytes
        assert load["received_nbytes"] > nbytes
        assert (load["retries"], load["over_read_nbytes"]) == (0, 0)
        assert 0 < load["seconds"] < 60
        assert load["gb_per_s"] == pytest.approx(nbytes / load["seconds"] / 1e9)
        assert load["extra_memory_bytes"] > 0  # worker processes, at least
        assert (load["verified_nbytes"], load["unverified_nbytes"]) == (0, load["received_nbytes"])
    document = json.loads(run(checkpoint, "--json").stdout)
    [load] = document["loads"]
    assert document["is_verified"] is True
    assert (load["verified_nbytes"], load["unverified_nbytes"]) == (load["received_nbytes"], 0)


def test_load_of_what_matches_reads_no_more(checkpoint: str, run: Run) -> None:
    document = json.loads(run(checkpoint, "--match", "weights.[13]", "--max-gap-size", "0", "--json").stdout)
    assert document["loads"][0]["nbytes"] == 2 * 400_000
    assert document["loads"][0]["received_nbytes"] < 2 * 400_000 + 10_000
    nothing = run(checkpoint, "--match", "nix")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert nothing.stderr.startswith("mpreader: nothing in the checkpoint matches 'nix'")


def test_load_of_a_damaged_checkpoint_ends_in_exit_code_5(checkpoint: str, run: Run) -> None:
    def flip(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    rewrite(f"{checkpoint}/__0_1.distcp", flip)
    done = run(checkpoint)
    assert (done.returncode, done.stdout) == (5, "")
    assert f"is damaged in {checkpoint}/__0_1.distcp" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    error = json.loads(run(checkpoint, "--json").stdout)["error"]
    assert (error["type"], error["key"]) == ("ChecksumMismatch", "runs/one/__0_1.distcp")
    assert run(checkpoint, "--no-verify").returncode == 0


def test_load_of_no_checkpoint_ends_in_exit_code_3(bucket: str, run: Run) -> None:
    done = run(f"s3://{bucket}/missing")
    assert (done.returncode, done.stdout) == (3, "")
    assert f": s3://{bucket}/missing/.metadata: the bucket exists, but has no such key" in done.stderr
    assert run(f"ftp://{bucket}/missing").returncode == 2


def test_load_refuses_what_does_not_fit_before_it_asks_for_it(checkpoint: str, s3_server: S3Server, run: Run) -> None:
    def enlarge(data: bytes) -> bytes:
        metadata = pickle.loads(data)
        entry = metadata.state_dict_metadata["weights.0"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = torch.Size([1 << 50])
        return pickle.dumps(metadata)

    rewrite(f"{checkpoint}/.metadata", enlarge)
    before = len(s3_server.requests)
    done = run(checkpoint)
    assert (done.returncode, done.stdout) == (2, "")
    assert "bytes of memory are free here; select some of them (match=, --match)" in done.stderr
    assert [request.path.rpartition("/")[2] for request in s3_server.requests[before:]] == [".metadata"]
    assert run(checkpoint, "--match", "weights.[1-5]").returncode == 0


def test_load_records_a_timeline_of_all_its_requests(
    checkpoint: str, s3_server: S3Server, tmp_path: Path, run: Run
) -> None:
    before = len(s3_server.requests)
    done = run(checkpoint, "--repeat", "2", "--part-size", "64KiB", "--timeline", tmp_path / "load.json")
    assert (done.returncode, done.stderr) == (0, "")
    asked = [request for request in s3_server.requests[before:] if request.path.endswith(".distcp")]
    events = json.loads((tmp_path / "load.json").read_text())["traceEvents"]
    recorded = [event for event in events if event.get("args", {}).get("uri", "").endswith(".distcp")]
    assert {event["args"]["uri"] for event in recorded} == {f"s3:/{request.path}" for request in asked}
    assert len(recorded) >= sum(request.method == "GET" for request in asked)
    before = len(s3_server.requests)
    refused = run(checkpoint, "--timeline", tmp_path / "load.txt")
    assert (refused.returncode, len(s3_server.requests)) == (2, before)
    assert "a timeline is saved as .png (a picture) or .json" in refused.stderr


def test_load_shows_a_bar_where_that_is_asked_for(checkpoint: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mpreader.telemetry.progress._DELAY_S", 0.0
    )  # such a small load would be done before it appears
    shown = run(checkpoint, "--progress", "--json")
    assert "load: 100%" in shown.stderr
    assert json.loads(shown.stdout)["loads"]
    assert run(checkpoint).stderr == run(checkpoint, "--no-progress").stderr == ""
