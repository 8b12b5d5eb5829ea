"""Tensors of safetensors files on S3, compared with what the safetensors library has written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import torch
from safetensors.torch import save

from mpreader import ObjectMissing, PlanError, PoolClosed, PoolConfig
from mpreader.config import MiB
from mpreader.formats.torch_tensors import TORCH_DTYPES
from mpreader.safetensors import HeaderRefused, load_checkpoint, load_file, safe_open
from tests.integration.safetensors.comparison import assert_same

if TYPE_CHECKING:
    from mpreader.testing import S3Server

POOL = PoolConfig(workers=1, max_memory=8 * MiB)


def put(bucket: str, key: str, body: bytes) -> str:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key=key, Body=body)
    client.close()
    return f"s3://{bucket}/{key}"


def some_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(64, dtype=torch.uint8).view(dtype).reshape(-1, 2)


TENSORS: dict[str, torch.Tensor] = {
    **{str(dtype): some_of(dtype) for dtype in TORCH_DTYPES.values() if dtype not in (torch.bool,)},
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "large": torch.arange(3 * MiB, dtype=torch.int32),
}


def test_file_of_every_type_is_loaded(bucket: str) -> None:
    uri = put(bucket, "model.safetensors", save(TENSORS))
    assert_same(load_file(uri, pool_config=POOL), TENSORS)
    names = ["scalar", "large"]
    assert_same(load_file(uri, names=names, pool_config=POOL), {name: TENSORS[name] for name in names})


@pytest.mark.parametrize("has_index", [True, False])
def test_directory_is_loaded_with_and_without_an_index(bucket: str, has_index: bool) -> None:
    parts = [dict(list(TENSORS.items())[start::3]) for start in range(3)]
    index: dict[str, Any] = {"weight_map": {}}
    for number, part in enumerate(parts):
        put(bucket, f"model/{number}.safetensors", save(part))
        index["weight_map"].update(dict.fromkeys(part, f"{number}.safetensors"))
    put(bucket, "model/other.bin", b"none of it")
    if has_index:
        put(bucket, "model/unused.safetensors", save({"large": torch.zeros(1)}))
        put(bucket, "model/model.safetensors.index.json", json.dumps(index).encode())
    assert_same(load_checkpoint(f"s3://{bucket}/model/", pool_config=POOL), TENSORS)


def test_header_of_many_tensors_is_read_in_two_pieces(bucket: str) -> None:
    tensors = {f"tensor {number:05} {'x' * 50}": torch.tensor([number]) for number in range(3000)}
    assert_same(load_file(put(bucket, "many.safetensors", save(tensors)), pool_config=POOL), tensors)


def test_errors_name_what_is_wrong(bucket: str) -> None:
    content = save({"a": torch.ones(4)})
    cut = put(bucket, "cut.safetensors", content[:-1])
    with pytest.raises(HeaderRefused, match=f"{cut}: the tensors end at"):
        load_file(cut, pool_config=POOL)
    with pytest.raises(PlanError, match="no tensor 'b' is in"):
        load_file(put(bucket, "a.safetensors", content), names=["a", "b"], pool_config=POOL)
    with pytest.raises(ObjectMissing, match=r"no \.safetensors file"):
        load_checkpoint(f"s3://{bucket}/nothing", pool_config=POOL)
    with pytest.raises(ObjectMissing):
        load_file(f"s3://{bucket}/none.safetensors", pool_config=POOL)
    put(bucket, "twice/b.safetensors", content)
    put(bucket, "twice/c.safetensors", content)
    with pytest.raises(PlanError, match=r"tensor 'a' is in .*b\.safetensors and in .*c\.safetensors"):
        load_checkpoint(f"s3://{bucket}/twice", pool_config=POOL)
    put(bucket, "bad/model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(PlanError, match="no file of this directory"):
        load_checkpoint(f"s3://{bucket}/bad", pool_config=POOL)


def test_tensors_that_are_asked_for_in_order_are_read_ahead(bucket: str, s3_server: S3Server) -> None:
    tensors = {f"{number:03}": torch.full((1000,), number) for number in range(300)}
    uri = put(bucket, "many.safetensors", save(tensors))
    with safe_open(uri, pool_config=POOL) as file:
        before = len(s3_server.requests)
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in sorted(tensors))
        assert len(s3_server.requests) - before < 10
        assert torch.equal(file.get_tensor("123"), tensors["123"])
        assert torch.equal(file.get_slice("124")[5:7], tensors["124"][5:7])
        assert torch.equal(file.get_tensor("124"), tensors["124"])  # the rest is read ahead, and nobody takes it
    with pytest.raises(PoolClosed, match=f"{uri} was closed; open it again"):
        file.get_tensor("125")
    dropped = safe_open(uri, pool_config=POOL)
    assert [int(dropped.get_tensor(name)[0]) for name in ("000", "001")] == [0, 1]
