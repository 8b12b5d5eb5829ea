"""Conversion to one local file: what torch.load reads of it is what was saved; what fails leaves nothing behind."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint import format_utils
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ChecksumMismatch, PoolConfig
from mpreader.config import KiB, MiB
from mpreader.dcp import (
    ItemRefused,
    S3FileSystem,
    S3StorageWriter,
    dcp_to_torch_save,
    describe_checkpoint,
    load_checkpoint,
)
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.testing import S3Server

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=64 * KiB)


def example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {
            f"layers.{number}.weight": torch.randint(0, 255, (90, 1001), dtype=torch.uint8, generator=generator)
            for number in range(4)
        },
        "bfloat16": torch.randn(300, 70, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "signs": torch.tensor([-0.0, 0.0, float("nan"), -float("nan"), -float("inf")]),
        "empty": torch.empty(0, 7),
        "transposed": torch.arange(6000).reshape(60, 100).t(),
        "parameter": torch.nn.Parameter(torch.ones(7)),
        "optimizer": {
            "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(9)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "params": [0, 1]}, {"lr": 2.0, "params": []}],
        },
        "mixed": [torch.ones(2), "text", None, {"deep": [torch.zeros(1)]}],
        "epoch": 3,
    }


def save_to(uri: str, state: dict[str, Any], **options: Any) -> str:
    save(state, storage_writer=S3StorageWriter("us-east-1", uri, thread_count=2), **options)
    return uri


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of a checkpoint of :func:`example`."""
    return save_to(f"s3://{bucket}/runs/one", example())


def download(uri: str, folder: Path) -> Path:
    """Copy a checkpoint to a local folder."""
    files = S3FileSystem()
    for file in files.ls(uri):
        target = folder / file.removeprefix(f"{uri}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.create_stream(file, "rb") as stream:
            target.write_bytes(stream.read())
    files.close()
    return folder


def assert_same(loaded: Any, expected: Any) -> None:
    """Same types, order of keys, values, and bits."""
    assert type(loaded) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (loaded.dtype, loaded.shape, loaded.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (loaded, expected)))
    elif isinstance(expected, dict):
        assert list(loaded) == list(expected)
        for key, value in expected.items():
            assert_same(loaded[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(loaded) == len(expected)
        for one, other in zip(loaded, expected, strict=True):
            assert_same(one, other)
    else:
        assert loaded == expected


@pytest.mark.parametrize("flattens", [True, False])
def test_convert_gives_what_torchs_own_function_gives(bucket: str, tmp_path: Path, flattens: bool) -> None:
    state = example() if flattens else {"weight": torch.ones(3, 4), "nested": {"epoch": 3}}
    uri = save_to(f"s3://{bucket}/runs/one", state, planner=DefaultSavePlanner(flatten_state_dict=flattens))
    dcp_to_torch_save(uri, tmp_path / "ours.pt", pool_config=POOL)
    format_utils.dcp_to_torch_save(download(uri, tmp_path / "downloaded"), tmp_path / "torchs.pt")
    ours = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert_same(ours, torch.load(tmp_path / "torchs.pt", weights_only=True))
    assert_same(load_checkpoint(uri), ours)


def test_load_checkpoint_gives_what_was_saved(checkpoint: str) -> None:
    expected = example()
    expected["parameter"] = expected["parameter"].data
    expected["transposed"] = expected["transposed"].contiguous()
    expected["optimizer"]["state"] = {"0": expected["optimizer"]["state"][0]}  # DCP makes every key a string
    assert_same(load_checkpoint(checkpoint, pool_config=POOL), expected)


def test_load_checkpoint_of_what_matches(checkpoint: str) -> None:
    loaded = load_checkpoint(checkpoint, match=("model.*.1.*", "mixed.3.*", "epoch"))
    assert_same(
        loaded,
        {
            "model": {"layers.1.weight": example()["model"]["layers.1.weight"]},
            "mixed": [None, None, None, {"deep": [torch.zeros(1)]}],
            "epoch": 3,
        },
    )
    with pytest.raises(PlanError, match="nothing in the checkpoint matches 'weights'"):
        load_checkpoint(checkpoint, match="weights")


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_load_checkpoint_runs_nothing_of_its_authors_unless_it_is_trusted(bucket: str, tmp_path: Path) -> None:
    uri = save_to(f"s3://{bucket}/evil", {"weight": torch.ones(3), "args": Runs(tmp_path / "ran")})
    with pytest.raises(ItemRefused, match=r"'args' is no tensor, .*nothing of it was run.*weights_only=False"):
        load_checkpoint(uri)
    with pytest.raises(ItemRefused):
        dcp_to_torch_save(uri, tmp_path / "file.pt")
    assert os.listdir(tmp_path) == []
    assert load_checkpoint(uri, weights_only=False)["args"] is None
    assert os.listdir(tmp_path) == ["ran"]


def test_item_of_a_foreign_class_is_loaded_where_it_is_trusted(bucket: str, tmp_path: Path) -> None:
    uri = save_to(f"s3://{bucket}/args", {"args": argparse.Namespace(lr=2)})
    with pytest.raises(ItemRefused, match=r"'args' .*argparse\.Namespace"):
        load_checkpoint(uri)
    dcp_to_torch_save(uri, tmp_path / "file.pt", weights_only=False)
    assert torch.load(tmp_path / "file.pt", weights_only=False) == {"args": argparse.Namespace(lr=2)}


def test_errors_come_as_they_are_and_leave_the_old_file(checkpoint: str, bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    file.write_text("old")
    damage(checkpoint)
    with pytest.raises(ChecksumMismatch, match="is damaged in"):
        dcp_to_torch_save(checkpoint, file)
    with pytest.raises(ObjectMissing):
        dcp_to_torch_save(f"s3://{bucket}/missing", file)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.pt"]
    dcp_to_torch_save(checkpoint, file, verify=False)
    assert torch.load(file, weights_only=True)["epoch"] == 3
    assert os.listdir(tmp_path) == ["file.pt"]


def damage(uri: str) -> None:
    """Flip a bit in the middle of every tensor that is large enough to be hit."""
    files = S3FileSystem()
    for file in files.ls(uri):
        if file.endswith(".distcp"):
            with files.create_stream(file, "rb") as stream:
                data = bytearray(stream.read())
            data[len(data) // 2] ^= 1
            with files.create_stream(file, "wb") as stream:
                stream.write(data)
    files.close()


def test_convert_refuses_a_place_that_can_not_be_written_before_it_loads(tmp_path: Path) -> None:
    # There is no such bucket: it would be missed if it were asked for.
    with pytest.raises(ConfigError, match=r"there is no folder '.*missing' to write 'file.pt' to"):
        dcp_to_torch_save("s3://nobody/nothing", tmp_path / "missing" / "file.pt")
    with pytest.raises(ConfigError, match="is a folder or a device, not a file"):
        dcp_to_torch_save("s3://nobody/nothing", tmp_path)
    with pytest.raises(ConfigError, match="is a folder or a device, not a file"):
        dcp_to_torch_save("s3://nobody/nothing", os.devnull)
    with pytest.raises(OSError, match=r"'/proc/file\.pt'"):
        dcp_to_torch_save("s3://nobody/nothing", "/proc/file.pt")  # no permissions help: nobody can write there
    (tmp_path / "file.pt").write_text("old")
    with pytest.raises(ConfigError, match=r"file\.pt' is there already; overwrite=True"):
        dcp_to_torch_save("s3://nobody/nothing", tmp_path / "file.pt", overwrite=False)
    assert (tmp_path / "file.pt").read_text() == "old"


def test_convert_refuses_what_the_disk_can_not_hold_before_it_loads(
    checkpoint: str, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = describe_checkpoint(checkpoint).nbytes
    fstatvfs = os.fstatvfs

    def nearly_full(descriptor: int) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=nbytes - 1, f_frsize=1, f_bsize=fstatvfs(descriptor).f_bsize)

    monkeypatch.setattr(os, "fstatvfs", nearly_full)
    before = len(s3_server.requests)
    with pytest.raises(PlanError, match=rf"tensors take {nbytes} bytes, but only {nbytes - 1} bytes are free on its"):
        dcp_to_torch_save(checkpoint, tmp_path / "file.pt")
    assert [request.path.rpartition("/")[2] for request in s3_server.requests[before:]] == [".metadata"]
    assert os.listdir(tmp_path) == []
    dcp_to_torch_save(checkpoint, tmp_path / "file.pt", match="epoch")  # it has room for that


def test_convert_shows_a_bar_for_the_load_and_one_for_the_file(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpreader.telemetry.progress._DELAY_S", 0.0)  # else such a small one shows none
    dcp_to_torch_save(checkpoint, tmp_path / "file.pt", progress=True)
    shown = capsys.readouterr().err
    assert "load: 100%" in shown
    assert "write: 100%" in shown


def test_convert_replaces_what_a_link_points_to(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "real.pt").write_text("old")
    (tmp_path / "link.pt").symlink_to("real.pt")
    dcp_to_torch_save(checkpoint, tmp_path / "link.pt", match="epoch")
    assert (tmp_path / "link.pt").is_symlink()
    assert torch.load(tmp_path / "real.pt", weights_only=True) == {"epoch": 3}


# -- the command


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(run_here: Run) -> Run:
    return partial(run_here, "convert")


def test_command_converts_and_replaces_only_what_it_may(
    checkpoint: str, tmp_path: Path, run: Run, warm_interpreter: WarmInterpreter
) -> None:
    file = tmp_path / "file.pt"
    command = ["mpreader", "convert", checkpoint, str(file), "--match", "model.*"]
    done = warm_interpreter.run(*command, module="mpreader", is_strict=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{file}: 36")
    assert_same(torch.load(file, weights_only=True), {"model": example()["model"]})
    refused = run(checkpoint, file)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"mpreader: '{file}' is there already; overwrite=True (--overwrite) replaces it\n"
    replaced = json.loads(run(checkpoint, file, "--match", "epoch", "--overwrite", "--json").stdout)
    assert torch.load(file, weights_only=True) == {"epoch": 3}
    assert (replaced["file"], replaced["nbytes"]) == (str(file), file.stat().st_size)


def test_command_says_what_is_wrong(checkpoint: str, bucket: str, tmp_path: Path, run: Run) -> None:
    no_folder = run(checkpoint, tmp_path / "missing" / "file.pt")
    assert no_folder.returncode == 2
    assert no_folder.stderr.startswith("mpreader: there is no folder ")
    file = tmp_path / "file.pt"
    assert run(f"s3://{bucket}/missing", file).returncode == 3
    unmatched = run(checkpoint, file, "--match", "nix*")
    assert (unmatched.returncode, "nothing in the checkpoint matches 'nix*'" in unmatched.stderr) == (2, True)
    damage(checkpoint)
    damaged = run(checkpoint, file, "--json")
    assert (damaged.returncode, json.loads(damaged.stdout)["error"]["type"]) == (5, "ChecksumMismatch")
    assert os.listdir(tmp_path) == []


def test_command_runs_nothing_of_the_authors_unless_it_is_told_to(bucket: str, tmp_path: Path, run: Run) -> None:
    uri = save_to(f"s3://{bucket}/evil", {"weight": torch.ones(3), "args": Runs(tmp_path / "ran")})
    refused = run(uri, tmp_path / "file.pt")
    assert (refused.returncode, os.listdir(tmp_path)) == (2, [])
    assert "(--trust)" in refused.stderr
    assert run(uri, tmp_path / "file.pt", "--trust").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["file.pt", "ran"]


def test_command_leaves_no_half_file_where_the_disk_is_full(
    checkpoint: str, tmp_path: Path, warm_interpreter: WarmInterpreter
) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import resource, runpy, torch
save = torch.save
def save_to_a_full_disk(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    save(*arguments)
torch.save = save_to_a_full_disk
runpy.run_module("mpreader", run_name="__main__")
""")
    file = tmp_path / "files" / "file.pt"
    file.parent.mkdir()
    failed = warm_interpreter.run(program, "convert", checkpoint, file)
    assert failed.returncode == 1
    assert failed.stderr == f"mpreader: {file}: {os.strerror(errno.EFBIG)}\n"
    assert os.listdir(file.parent) == []
