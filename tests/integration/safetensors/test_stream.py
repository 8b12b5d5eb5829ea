"""Streams of tensors: bounded memory, and tensors that nobody overwrites."""

from __future__ import annotations

import gc
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import save, save_file

from mpreader import ConfigError, ObjectMissing, PoolConfig
from mpreader.config import MiB
from mpreader.safetensors import safe_open, stream

POOL = PoolConfig(workers=1, max_memory=8 * MiB)
TENSORS = {f"{number:02}": torch.full((MiB // 8,), number, dtype=torch.int32) for number in range(40)}  # 20 MiB
LARGE = {"large": torch.arange(3 * MiB, dtype=torch.int32), "empty": torch.empty(2, 0), "scalar": torch.tensor(1.5)}


@pytest.fixture
def uri(bucket: str) -> str:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a.safetensors", Body=save(TENSORS))
    client.put_object(Bucket=bucket, Key="b.safetensors", Body=save(LARGE))
    client.close()
    return f"s3://{bucket}"


@pytest.mark.parametrize("order", ["completion", "file"])
def test_tensors_are_handed_out_in_bounded_memory(uri: str, order: str) -> None:
    names = []
    with stream(uri, order=order, pool_config=POOL) as tensors:  # type: ignore[arg-type]
        for name, tensor in tensors:
            assert torch.equal(tensor, (TENSORS | LARGE)[name]), name
            names.append(name)
            del tensor
    assert sorted(names) == sorted(TENSORS | LARGE)
    if order == "file":
        with safe_open(uri, pool_config=POOL) as files:
            assert names == ["empty", *(name for name in files.offset_keys() if name != "empty")]


@pytest.mark.row("views held while the load goes on; close with live views")
def test_tensors_that_are_kept_are_never_overwritten(uri: str) -> None:
    kept = dict(stream(uri, pool_config=POOL))  # more than three times the memory
    assert all(torch.equal(kept[name], tensor) for name, tensor in (TENSORS | LARGE).items())
    # What is kept of one tensor keeps all of its slot, however little that is.
    heads = [(name, tensor[:1]) for name, tensor in stream(uri, names=list(TENSORS), pool_config=POOL)]
    assert all(head == int(name) for name, head in heads)
    assert all(torch.equal(kept[name], tensor) for name, tensor in (TENSORS | LARGE).items())


def test_tensors_are_converted_piece_by_piece(uri: str) -> None:
    with stream(uri, names=["large", "scalar", "00"], dtype=torch.float16, pool_config=POOL) as tensors:
        found = dict(tensors)
    assert torch.equal(found["large"], LARGE["large"])
    assert found["scalar"].dtype == torch.float16
    assert found["scalar"] == 1.5


def test_stream_that_is_dropped_or_closed_ends_its_downloads(uri: str, tmp_path: Path) -> None:
    tensors = stream(uri, order="file", names=sorted(TENSORS), pool_config=POOL)
    name, tensor = next(tensors)
    tensors.close()
    assert list(tensors) == []
    assert torch.equal(tensor, TENSORS[name])
    del tensor
    next(stream(uri, pool_config=POOL))
    gc.collect()
    with pytest.raises(ConfigError, match='order is "completion" or "file"'):
        stream(uri, order="offset")  # type: ignore[arg-type]
    with pytest.raises(ObjectMissing):
        stream(f"{uri}/nothing", pool_config=POOL)
    save_file(LARGE, tmp_path / "c.safetensors")
    assert {name: tensor.sum() for name, tensor in stream(str(tmp_path))} == {n: t.sum() for n, t in LARGE.items()}
