"""Conversions between checkpoints of DCP and safetensors files: the same bits, all of them or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from safetensors.torch import load_file as load_by_library
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ChecksumMismatch, ObjectChanged, ObjectMissing, PlanError, PoolConfig, TransportError
from mpreader.config import KiB, MiB
from mpreader.dcp import MetadataRefused, S3FileSystem, S3StorageReader, S3StorageWriter
from mpreader.dcp import load_checkpoint as dcp_load_checkpoint
from mpreader.dcp.batches import BatchReader, TargetBox
from mpreader.dcp.checkpoint import LoadOptions
from mpreader.errors import ConfigError
from mpreader.s3 import S3Writer
from mpreader.s3.upload import MultipartUpload
from mpreader.safetensors import dcp_to_safetensors, load_checkpoint, safetensors_to_dcp
from mpreader.safetensors.conversion.ahead import loaded_ahead
from mpreader.safetensors.conversion.targets import LocalTarget, S3Target
from mpreader.testing import S3Server
from tests.integration.safetensors.comparison import assert_same, bits

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB)
BATCH_BYTES = 64 * KiB
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("shards", "sources"):
        monkeypatch.setattr(f"mpreader.safetensors.conversion.{module}.BATCH_BYTES", BATCH_BYTES)


def some_of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    generator = torch.Generator().manual_seed(count)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def example() -> dict[str, torch.Tensor]:
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.complex64)
    return {
        **{f"{dtype}": some_of(dtype, 5, 3) for dtype in (*usual, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)},
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "empty rows": torch.empty(3, 0, dtype=torch.int8),
        "name of ä/\n 😀": some_of(torch.int16, 7),
        "large": some_of(torch.float32, 300, 130),  # three batches
        "one large row": some_of(torch.uint8, 1, 2, 100_001),
    }


def save_to(uri: str, state: dict[str, Any], **options: Any) -> str:
    save(state, storage_writer=S3StorageWriter("us-east-1", uri, thread_count=2), **options)
    return uri


def loaded_by_dcp(uri: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    with S3StorageReader(None, uri, pool_config=POOL) as reader:
        load(state, storage_reader=reader)
    return state


def library_reads(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_by_library(file).items()}


@pytest.fixture
def keys(bucket: str) -> Iterator[Callable[[str], list[str]]]:
    """Lists the keys under a prefix; parts of an upload that was not ended are an error."""
    client = boto3.client("s3")

    def keys(prefix: str) -> list[str]:
        assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
        found = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        return [entry["Key"].removeprefix(f"{prefix}/") for entry in found]

    yield keys
    client.close()


def test_round_trip_keeps_every_bit(bucket: str, tmp_path: Path) -> None:
    state = example()
    uri = save_to(f"s3://{bucket}/dcp", state)
    done = dcp_to_safetensors(uri, tmp_path / "weights", max_shard_size=100 * KiB, pool_config=POOL)
    assert_same(library_reads(tmp_path / "weights"), state)
    assert (done.tensors, done.left_out, done.is_verified) == (len(state), (), True)
    assert [Path(file).name for file in done.files] == [*sorted(os.listdir(tmp_path / "weights"))]
    back = f"s3://{bucket}/back"
    safetensors_to_dcp(tmp_path / "weights", back, pool_config=POOL)
    assert_same(loaded_by_dcp(back, state), state)
    done = dcp_to_safetensors(back, f"s3://{bucket}/weights", pool_config=POOL)  # chunks that the converter has made
    assert done.files == (f"s3://{bucket}/weights/model.safetensors",)
    assert_same(load_checkpoint(f"s3://{bucket}/weights", pool_config=POOL), state)


def test_shards_are_bounded_and_their_index_names_them(bucket: str, keys: Callable[[str], list[str]]) -> None:
    state = {f"layers.{number}": some_of(torch.float32, 250) for number in range(7)}
    uri = save_to(f"s3://{bucket}/dcp", state)
    dcp_to_safetensors(uri, f"s3://{bucket}/out/", max_shard_size=3000, pool_config=POOL)
    files = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    assert keys("out") == [*files, INDEX]
    client = boto3.client("s3")
    index = json.load(client.get_object(Bucket=bucket, Key=f"out/{INDEX}")["Body"])
    client.close()
    assert index["metadata"] == {"total_size": 7000}
    assert index["weight_map"] == {f"layers.{number}": files[number // 3] for number in range(7)}
    assert_same(load_checkpoint(f"s3://{bucket}/out", pool_config=POOL), state)
    # Fewer files: those of before would otherwise belong to the directory.
    with pytest.raises(ConfigError, match=r"out/ has 'model-00001-of-00003\.safetensors' already"):
        dcp_to_safetensors(uri, f"s3://{bucket}/out", pool_config=POOL)
    dcp_to_safetensors(uri, f"s3://{bucket}/out", match="layers.[12]", overwrite=True, pool_config=POOL)
    assert keys("out") == ["model.safetensors"]


class _Shards(DefaultSavePlanner):
    """Saves each tensor in four pieces of rows (0) or columns (1), as ranks of FSDP or tensor parallelism do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._dim = dim

    def create_local_plan(self) -> SavePlan:
        items = [self._item(name, tensor, part) for name, tensor in self.state_dict.items() for part in range(4)]
        return SavePlan(items, planner_data={name: (name,) for name in self.state_dict})

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        tensor: torch.Tensor = self.state_dict[index.fqn]
        return tensor.narrow(self._dim, index.offset[self._dim], tensor.shape[self._dim] // 4).contiguous()

    def _item(self, name: str, tensor: torch.Tensor, part: int) -> WriteItem:
        offsets, sizes = [0, 0], [*tensor.shape]
        sizes[self._dim] //= 4
        offsets[self._dim] = part * sizes[self._dim]
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.shape)
        return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_tensors_are_put_together(bucket: str, tmp_path: Path, dim: int) -> None:
    state = {"small": some_of(torch.bfloat16, 12, 12), "large": some_of(torch.float32, 400, 80)}
    uri = save_to(f"s3://{bucket}/dcp", state, planner=_Shards(dim))
    done = dcp_to_safetensors(uri, tmp_path / "all.safetensors", pool_config=POOL)
    assert_same(load_by_library(tmp_path / "all.safetensors"), state)
    if dim == 0:  # each shard is loaded whole, once, so that its checksum can be compared
        assert sum(tensor.nbytes for tensor in state.values()) <= done.checked_nbytes < 1.2 * done.nbytes


def test_tensors_without_elements_make_a_round_trip(bucket: str, tmp_path: Path) -> None:
    state = {"a": torch.empty(0), "b": torch.empty(2, 0, dtype=torch.bool)}
    dcp_to_safetensors(save_to(f"s3://{bucket}/dcp", state), tmp_path / "a.safetensors", pool_config=POOL)
    assert_same(load_by_library(tmp_path / "a.safetensors"), state)
    safetensors_to_dcp(tmp_path / "a.safetensors", f"s3://{bucket}/back", pool_config=POOL)
    assert_same(dcp_load_checkpoint(f"s3://{bucket}/back", pool_config=POOL), state)


def test_floating_tensors_are_converted_and_others_are_not(bucket: str, tmp_path: Path) -> None:
    state = {"a": some_of(torch.int16, 4), "b": torch.randn(300, 130), "c": some_of(torch.float8_e5m2, 8)}
    uri = save_to(f"s3://{bucket}/dcp", state)
    dcp_to_safetensors(uri, tmp_path / "half.safetensors", dtype="bfloat16", pool_config=POOL)
    assert_same(load_by_library(tmp_path / "half.safetensors"), {**state, "b": state["b"].bfloat16()})


def test_what_can_not_be_stored_is_refused_before_anything_is_written(bucket: str, tmp_path: Path) -> None:
    uri = save_to(f"s3://{bucket}/dcp", {"weight": torch.ones(3), "step": 3, "deep": [torch.zeros(1), "text"]})
    with pytest.raises(PlanError, match=r"these items are none: step, deep\.1; leave them out by skip_other=True"):
        dcp_to_safetensors(uri, tmp_path / "out", pool_config=POOL)
    done = dcp_to_safetensors(uri, tmp_path / "out", skip_other=True, pool_config=POOL)
    assert done.left_out == ("step", "deep.1")
    assert_same(library_reads(tmp_path / "out"), {"weight": torch.ones(3), "deep.0": torch.zeros(1)})
    uri = save_to(f"s3://{bucket}/complex", {"z": torch.zeros(2, dtype=torch.complex128)})
    with pytest.raises(PlanError, match=r"can't hold the types of 'z' \(torch\.complex128\)"):
        dcp_to_safetensors(uri, tmp_path / "other", skip_other=True, pool_config=POOL)
    with pytest.raises(ConfigError, match="is a floating point type"):
        dcp_to_safetensors(uri, tmp_path / "other", dtype="int8", pool_config=POOL)
    with pytest.raises(ConfigError, match="the folder above it is missing"):
        dcp_to_safetensors(f"s3://{bucket}/dcp", tmp_path / "other" / "out", skip_other=True, pool_config=POOL)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("is_local", [True, False])
def test_damaged_result_is_noticed_and_removed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Callable[[str], list[str]], is_local: bool
) -> None:
    uri = save_to(f"s3://{bucket}/dcp", example())
    place: Any
    place, target = (LocalTarget, str(tmp_path / "out")) if is_local else (S3Target, f"s3://{bucket}/out")
    blocks = place.blocks

    def damaged(self: Any, name: str, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        with_errors = [bytearray(block) for block in blocks(self, name, ranges)]
        with_errors[-1][-1] ^= 1
        yield from map(bytes, with_errors)

    monkeypatch.setattr(place, "blocks", damaged)
    with pytest.raises(ChecksumMismatch, match=r"model\.safetensors: tensor '.*' differs from what was written"):
        dcp_to_safetensors(uri, target, pool_config=POOL)
    assert os.listdir(tmp_path) == []
    assert keys("out") == []
    dcp_to_safetensors(uri, target, verify=False, pool_config=POOL)


def test_failing_upload_leaves_neither_objects_nor_parts(
    bucket: str, tmp_path: Path, s3_server: S3Server, keys: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"small": some_of(torch.uint8, 100), "large": some_of(torch.uint8, 12 * MiB)}
    uri = save_to(f"s3://{bucket}/dcp", state)
    send = MultipartUpload.send

    def fails_at_second(self: MultipartUpload, number: int, body: bytearray) -> None:
        if number == 2:
            raise TransportError("the service is gone")
        send(self, number, body)

    monkeypatch.setattr(MultipartUpload, "send", fails_at_second)
    with pytest.raises(TransportError, match="the service is gone"):
        dcp_to_safetensors(uri, f"s3://{bucket}/out", max_shard_size=MiB, pool_config=POOL)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(TransportError, match="the service is gone"):
        safetensors_to_dcp(tmp_path, f"s3://{bucket}/back", pool_config=POOL)
    assert keys("out") == keys("back") == []


def test_object_that_was_complete_when_it_was_interrupted_is_removed(
    bucket: str, tmp_path: Path, keys: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    uri = f"s3://{bucket}/back"
    safetensors_to_dcp(tmp_path, uri, pool_config=POOL)
    close = S3Writer.close

    def interrupted(self: S3Writer) -> None:
        close(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(S3Writer, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dcp_to_safetensors(uri, f"s3://{bucket}/out", pool_config=POOL)
        with pytest.raises(KeyboardInterrupt):
            safetensors_to_dcp(tmp_path, f"s3://{bucket}/other", pool_config=POOL)
    assert keys("out") == keys("other") == []


def test_damaged_checkpoint_is_noticed_and_removed(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Callable[[str], list[str]]
) -> None:
    save_file(example(), tmp_path / "model.safetensors")
    read = BatchReader.read

    def damaged(self: BatchReader, boxes: Sequence[TargetBox]) -> None:
        read(self, boxes)
        for box in boxes:
            bits(box.target)[-1:] ^= 1

    monkeypatch.setattr(BatchReader, "read", damaged)
    with pytest.raises(ChecksumMismatch, match=r"back: tensor '.*' differs from what was written"):
        safetensors_to_dcp(tmp_path, f"s3://{bucket}/back", pool_config=POOL)
    assert keys("back") == []
    safetensors_to_dcp(tmp_path, f"s3://{bucket}/back", verify=False, pool_config=POOL)


def test_checkpoint_is_replaced_only_where_that_is_asked_for(bucket: str, tmp_path: Path) -> None:
    target = f"s3://{bucket}/back"
    save_to(target, {"old": torch.ones(2)})
    save_file({"new": torch.ones(3), "other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"back has a checkpoint already; overwrite=True"):
        safetensors_to_dcp(tmp_path, target, pool_config=POOL)
    assert_same(loaded_by_dcp(target, {"old": torch.ones(2)}), {"old": torch.ones(2)})
    with pytest.raises(PlanError, match="matches 'old'"):
        safetensors_to_dcp(tmp_path, target, match="old", overwrite=True, pool_config=POOL)
    with pytest.raises(ObjectMissing):
        safetensors_to_dcp(tmp_path / "none", target, overwrite=True, pool_config=POOL)
    done = safetensors_to_dcp(tmp_path, target, match="n*", overwrite=True, pool_config=POOL)
    assert done.tensors == 1
    assert dcp_load_checkpoint(target).keys() == {"new"}
    with pytest.raises(ConfigError, match="are written to S3 only"):
        safetensors_to_dcp(tmp_path, tmp_path / "dcp", pool_config=POOL)


def batch_reader(uri: str) -> BatchReader:
    return BatchReader(uri, LoadOptions(None, None, POOL, 0, None, True, True, (), False, False))


def test_all_batches_are_of_one_version(bucket: str) -> None:
    state = {"a": torch.zeros(10), "b": torch.zeros(10)}
    uri = save_to(f"s3://{bucket}/dcp", state)
    with batch_reader(uri) as reader:
        reader.read([TargetBox("a", (0,), torch.empty(10)), TargetBox("b", (2,), torch.empty(5))])
        with contextlib.closing(S3FileSystem()) as files:
            files.rm_file(f"{uri}/.metadata")
        save_to(uri, {name: tensor + 1 for name, tensor in state.items()})
        with pytest.raises(ObjectChanged):
            reader.read([TargetBox("a", (0,), torch.empty(10))])


def test_box_that_is_not_stored_is_refused(bucket: str) -> None:
    uri = save_to(f"s3://{bucket}/dcp", {"a": torch.zeros(10)})
    with batch_reader(uri) as reader, pytest.raises(MetadataRefused, match="where all of 'a' is stored"):
        reader.read([TargetBox("a", (5,), torch.empty(6))])


def test_next_batch_is_loaded_ahead_and_no_other_one() -> None:
    loaded: list[int] = []
    second = threading.Event()

    def load(number: int) -> int:
        loaded.append(number)
        if number == 1:
            second.set()
        return number

    with contextlib.closing(loaded_ahead(load, range(5))) as values:
        assert next(values) == 0
        assert second.wait(30)
        assert loaded == [0, 1]
        assert list(values) == [1, 2, 3, 4]
