"""Every program in scripts/examples runs as it is, and prints what is true."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import random
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import boto3
import pytest
import torch
from safetensors.torch import save as safetensors_of
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import S3StorageWriter

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"
MiB = 1024 * 1024

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def put(bucket: str, **objects: bytes) -> None:
    with contextlib.closing(boto3.client("s3")) as client:
        for key, content in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=content)


class Run(Protocol):
    """Run an example, which must succeed; returns the lines that it prints."""

    def __call__(self, name: str, *arguments: str, preload: tuple[str, ...] = ()) -> list[str]: ...


@pytest.fixture
def run(warm_interpreter: WarmInterpreter) -> Run:
    def run(name: str, *arguments: str, preload: tuple[str, ...] = ()) -> list[str]:
        done = warm_interpreter.run(EXAMPLES / name, *arguments, preload=preload)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout.splitlines()

    return run


def skip_without(module: str) -> None:
    """Skip a test if a module is missing. It is not imported: its objects would slow all later garbage collections."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def check_async_fetch(run: Run, bucket: str, folder: Path) -> None:
    large, small = random.Random(1).randbytes(20 * MiB + 5), b"small"
    put(bucket, large=large, small=small)
    uris = [f"s3://{bucket}/large", f"s3://{bucket}/small"]
    assert run("async_fetch.py", *uris) == [
        f"sha256 {hashlib.sha256(large).hexdigest()} {uris[0]}",
        f"begins {large[:4].hex()} {uris[0]}",
        f"begins {small[:4].hex()} {uris[1]}",
    ]


def check_convert_checkpoint(run: Run, bucket: str, folder: Path) -> None:
    model = {"weight": torch.randn(300, 100), "bias": torch.randn(100)}
    uri, path = f"s3://{bucket}/checkpoint", folder / "checkpoint.pt"
    save({"model": model, "step": 7}, storage_writer=S3StorageWriter(None, uri), no_dist=True)
    [line] = run("convert_checkpoint.py", uri, str(path), "model.*")
    assert line == f"{path}: {path.stat().st_size} bytes, model"
    loaded = torch.load(path, weights_only=True)
    assert {name: tensor.tolist() for name, tensor in loaded["model"].items()} == {
        name: tensor.tolist() for name, tensor in model.items()
    }


def check_fsspec_read(run: Run, bucket: str, folder: Path) -> None:
    put(bucket, **{"folder/a.txt": b"line one\nline two\n", "folder/below/b": bytes(range(50)), "not-this": b"x"})
    assert run("fsspec_read.py", f"mpreader://{bucket}/folder") == [
        "2 files, 68 bytes",
        f"{bucket}/folder/a.txt ends with {b'two'.hex()}0a",
        f"{bucket}/folder/below/b ends with 2e2f3031",
        "first line: line one",
    ]


def check_timeline(run: Run, bucket: str, folder: Path) -> None:
    put(bucket, large=bytes(5 * MiB))
    picture = folder / "timeline.png"
    assert run("timeline.py", f"s3://{bucket}/large", str(picture)) == [f"{5 * MiB} bytes received, drawn in {picture}"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def check_torchtitan_style(run: Run, bucket: str, folder: Path) -> None:
    [first] = run("torchtitan_style.py", f"s3://{bucket}/run", "3")
    [resumed] = run("torchtitan_style.py", f"s3://{bucket}/run", "2")
    [at_once] = run("torchtitan_style.py", f"s3://{bucket}/other", "5")
    assert re.match(r"from step 0 to 3: loss \d", first)
    assert resumed == at_once.replace("from step 0", "from step 3"), "it goes on where it stopped, to the last bit"


def check_lightning_checkpoint(run: Run, bucket: str, folder: Path) -> None:
    skip_without("pytorch_lightning")
    *_, first = run("lightning_checkpoint.py", f"s3://{bucket}/run", "1", preload=("pytorch_lightning",))
    *_, resumed = run("lightning_checkpoint.py", f"s3://{bucket}/run", "1")
    *_, at_once = run("lightning_checkpoint.py", f"s3://{bucket}/other", "2")
    assert first.startswith(f"s3://{bucket}/run/epochs=1.ckpt: 64 steps")
    assert resumed == at_once.replace("other", "run"), "it goes on where it stopped, to the last bit"
    assert "128 steps" in resumed
    with contextlib.closing(boto3.client("s3")) as client:
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix="run/")["Contents"]]
    assert {key.split("/")[1] for key in keys} == {"epochs=2.ckpt"}, "the older one is removed"


def check_transformers_from_s3(run: Run, bucket: str, folder: Path) -> None:
    skip_without("transformers")
    [line] = run("transformers_from_s3.py", f"s3://{bucket}/models/tiny", preload=("transformers.models.llama",))
    assert re.fullmatch(r"\d+ parameters, the same numbers: True", line)
    with contextlib.closing(boto3.client("s3")) as client:
        keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket, Prefix="models/tiny/")["Contents"]]
    assert len([key for key in keys if key.endswith(".safetensors")]) > 1


def check_torchtitan_from_hf(run: Run, bucket: str, folder: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "torchtitan_from_hf.py"))
    torch.manual_seed(0)
    model, tokens = example["make_model"](), torch.arange(example["TOKENS"])
    named = [(example["hf_name"](name), tensor) for name, tensor in model.state_dict().items()]
    files = {f"model-{start}.safetensors": dict(named[start::2]) for start in range(2)}
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    put(bucket, **{f"model/{file}": safetensors_of(tensors) for file, tensors in files.items()})
    put(bucket, **{"model/model.safetensors.index.json": json.dumps(index).encode()})
    loss = torch.nn.functional.cross_entropy(model(tokens), tokens).item()
    nbytes = sum(tensor.nbytes for _, tensor in named)
    assert run("torchtitan_from_hf.py", f"s3://{bucket}/model", preload=("torch.distributed.fsdp",)) == [
        f"loss {loss:.5f}, {nbytes} bytes received for 2 ranks"
    ]


def check_vllm_loader(run: Run, bucket: str, folder: Path) -> None:
    # A program finds what lies beside it first: the stub, in place of a vLLM that may be installed.
    shutil.copytree(Path(__file__).parent / "vllm_stub", folder, dirs_exist_ok=True)
    (folder / "vllm_loader.py").symlink_to(EXAMPLES / "vllm_loader.py")
    weights = {"linear.bias": torch.tensor([5.0, 6.0]), "linear.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    put(bucket, **{"model/model.safetensors": safetensors_of(weights | {"unused": torch.zeros(9)})})
    assert run(str(folder / "vllm_loader.py"), str(folder), f"s3://{bucket}/model", "say") == [
        "say: {'linear.weight': [[1.0, 2.0], [3.0, 4.0]], 'linear.bias': [5.0, 6.0]}"
    ]


CHECKS: dict[str, Callable[[Run, str, Path], None]] = {
    "async_fetch.py": check_async_fetch,
    "convert_checkpoint.py": check_convert_checkpoint,
    "fsspec_read.py": check_fsspec_read,
    "lightning_checkpoint.py": check_lightning_checkpoint,
    "timeline.py": check_timeline,
    "torchtitan_from_hf.py": check_torchtitan_from_hf,
    "torchtitan_style.py": check_torchtitan_style,
    "transformers_from_s3.py": check_transformers_from_s3,
    "vllm_loader.py": check_vllm_loader,
}


@pytest.mark.parametrize("name", CHECKS)
def test_example_runs_as_it_is_and_prints_what_is_true(name: str, run: Run, bucket: str, tmp_path: Path) -> None:
    CHECKS[name](run, bucket, tmp_path)


def test_every_example_has_a_check_and_says_how_it_is_run() -> None:
    examples = sorted(path for path in EXAMPLES.iterdir() if path.is_file())
    assert [path.name for path in examples] == sorted(CHECKS)
    for path in examples:
        text = path.read_text()
        assert f"python scripts/examples/{path.name} " in text, path.name
        assert len(text.splitlines()) <= 60, path.name
