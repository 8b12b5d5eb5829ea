"""``mpreader convert`` to and from safetensors, as a user calls it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import S3StorageWriter, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Run = Callable[..., subprocess.CompletedProcess[str]]
WEIGHT = torch.arange(1000.0).reshape(100, 10)


@pytest.fixture
def run(run_here: Run) -> Run:
    return partial(run_here, "convert")


@pytest.fixture
def checkpoint(bucket: str) -> str:
    uri = f"s3://{bucket}/checkpoint"
    save({"weight": WEIGHT, "step": 3}, storage_writer=S3StorageWriter(None, uri))
    return uri


def test_command_converts_there_and_back(checkpoint: str, bucket: str, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "model.safetensors"
    refused = run(checkpoint, file)
    assert refused.returncode == 2
    assert "and these items are none: step; leave them out by skip_other=True (--skip-other)" in refused.stderr
    done = run(checkpoint, file, "--skip-other", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{file}: 1 tensor, 4.")
    assert first.endswith("read back and verified")
    assert second == "left out, no tensors: step"
    assert torch.equal(load_file(file)["weight"], WEIGHT)
    back = json.loads(run(file, f"s3://{bucket}/back", "--json", "--no-verify").stdout)
    assert (back["files"][-1], back["tensors"]) == (f"s3://{bucket}/back/.metadata", 1)
    assert (back["verified"], back["left_out"]) == (False, [])
    assert torch.equal(load_checkpoint(f"s3://{bucket}/back")["weight"], WEIGHT)
    shards = run(f"s3://{bucket}/back", tmp_path / "shards", "--to", "safetensors", "--max-shard-size", "1K", "--json")
    assert [Path(name).name for name in json.loads(shards.stdout)["files"]] == ["model.safetensors"]
    again = run(f"s3://{bucket}/back", tmp_path / "shards", "--to", "safetensors")
    assert (again.returncode, "has 'model.safetensors' already" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://b/dcp", "s3://b/other"], "--to safetensors for safetensors files, --to dcp for a checkpoint of DCP"),
        (["s3://b/dcp", "folder/"], "--to safetensors for safetensors files, or the name of a file"),
        (["s3://b/dcp", "folder/model.pt", "--to", "dcp"], "checkpoints of DCP are written to S3"),
        (["s3://b/dcp", "s3://b/model.pt"], "a file for torch.load is written to a local disk only"),
        (["s3://b/dcp", "model.safetensors", "--to", "torch"], "has the name of a safetensors file"),
        (["s3://b/dcp", "model.pt", "--to", "safetensors"], "has the name of a file of torch"),
        (["s3://b/m.safetensors", "model.pt"], "is no checkpoint of DCP on S3"),
        (["https://hub/m", "out.safetensors"], "is no checkpoint of DCP on S3"),
        (["folder", "s3://b/dcp", "--dtype", "float16"], "--dtype is for conversions to safetensors, not to dcp"),
        (["s3://b/dcp", "out.safetensors", "--trust"], "--trust is for conversions to torch, not to safetensors"),
    ],
)
def test_command_refuses_what_it_can_not_mean(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
