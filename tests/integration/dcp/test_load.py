from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ChecksumMismatch, PoolConfig, S3ClientConfig, S3ReaderConstructor
from mpreader.config import MiB
from mpreader.dcp import (
    HexPrefixStrategy,
    MetadataRefused,
    S3FileSystem,
    S3PrefixStrategyBase,
    S3StorageReader,
    S3StorageWriter,
)
from mpreader.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

# Parts as small as can be, so that tensors are cut.
POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=16 * MiB, part_size=64 * 1024)

CONSTRUCTORS: dict[str, Callable[[], Any]] = {
    "sequential": S3ReaderConstructor.sequential,
    "range_based": S3ReaderConstructor.range_based,
    "dcp_optimized": S3ReaderConstructor.dcp_optimized,
    "dcp_optimized_no_gap": lambda: S3ReaderConstructor.dcp_optimized(max_gap_size=0),
    "multiprocess": lambda: S3ReaderConstructor.multiprocess(pool_config=POOL),
    "multiprocess_no_gap": lambda: S3ReaderConstructor.multiprocess(max_gap_size=0, pool_config=POOL),
}

DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
        *("complex128", "complex64", "complex32", "uint16", "uint32", "uint64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
]


@pytest.fixture(params=CONSTRUCTORS)
def constructor(request: pytest.FixtureRequest) -> Any:
    return CONSTRUCTORS[request.param]()


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool().reshape(shape)
    raw = torch.randint(0, 60, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def example() -> dict[str, Any]:
    tensors = {f"{dtype}".removeprefix("torch."): filled((5, 3), dtype) for dtype in DTYPES}
    shapes = {f"shape{number}": filled(shape, torch.float32) for number, shape in enumerate([(), (0,), (3, 0), (1, 1)])}
    return {
        **tensors,
        **shapes,
        "large": filled((300, 1001), torch.bfloat16),  # cut into several parts, at odd places
        "transposed": filled((40, 70), torch.float32).t(),
        "channels_last": filled((2, 3, 4, 5), torch.float32).contiguous(memory_format=torch.channels_last),
        "slice": filled((40, 70), torch.float32)[3:20, ::2],
        "parameter": torch.nn.Parameter(filled((7,), torch.float32)),
        "nested": {"epoch": 3, "name": "run", "list": [filled((4,), torch.int64), "text", None]},
    }


def zeroed(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return torch.zeros(state.shape, dtype=state.dtype)
    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    if isinstance(state, list):
        return [zeroed(value) for value in state]
    return type(state)() if state is not None else 0


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).tolist())


def assert_same(loaded: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert loaded.shape == expected.shape
        assert bits(loaded) == bits(expected)
    elif isinstance(expected, dict):
        assert loaded.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(loaded[key], value)
    elif isinstance(expected, list):
        assert len(loaded) == len(expected)
        for one, other in zip(loaded, expected, strict=True):
            assert_same(one, other)
    else:
        assert loaded == expected


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """The URI of a checkpoint of :func:`example`."""
    uri = f"s3://{bucket}/runs/one"
    save(example(), storage_writer=S3StorageWriter("us-east-1", uri))
    return uri


def test_load_gives_what_was_saved(checkpoint: str, constructor: Any) -> None:
    state = zeroed(example())
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_load_by_default_uses_worker_processes_and_gives_what_was_saved(checkpoint: str) -> None:
    state = zeroed(example())
    with S3StorageReader("us-east-1", checkpoint, pool_config=POOL) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_load_of_a_part_of_a_checkpoint(checkpoint: str, constructor: Any) -> None:
    state = {"int16": torch.zeros(5, 3, dtype=torch.int16), "nested": {"epoch": 0}}
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, {"int16": example()["int16"], "nested": {"epoch": 3}})


def test_load_converts_to_the_targets_dtype_and_strides(checkpoint: str, constructor: Any) -> None:
    state: dict[str, Any] = {"large": torch.zeros(1001, 300).t(), "int16": torch.zeros(5, 6, dtype=torch.int64)[:, ::2]}
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, {"large": example()["large"].float(), "int16": example()["int16"].long()})


class ShardedPlanner(DefaultLoadPlanner):
    """Reads every 2-d tensor as four boxes, as a differently sharded model does."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        plan.items[:] = [box for item in plan.items for box in self._boxes(item)]
        return plan

    def _boxes(self, item: ReadItem) -> list[ReadItem]:
        import dataclasses

        if len(item.lengths) != 2 or min(item.lengths) < 2:
            return [item]
        splits = [((0, length // 2), (length // 2, length - length // 2)) for length in item.lengths]
        return [
            dataclasses.replace(
                item,
                dest_offsets=torch.Size([row[0], column[0]]),
                storage_offsets=torch.Size([row[0], column[0]]),
                lengths=torch.Size([row[1], column[1]]),
            )
            for row in splits[0]
            for column in splits[1]
        ]


@pytest.mark.parametrize("kind", ["dcp_optimized", "multiprocess", "multiprocess_no_gap"])
def test_load_of_boxes_of_stored_tensors(checkpoint: str, kind: str) -> None:
    state = zeroed(example())
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=CONSTRUCTORS[kind]()) as reader:
        load(state, storage_reader=reader, planner=ShardedPlanner())
    assert_same(state, example())


def test_load_of_a_compressed_checkpoint(bucket: str, constructor: Any) -> None:
    uri = f"s3://{bucket}/compressed"
    save(example(), storage_writer=S3StorageWriter("us-east-1", uri, _extensions=[ZStandard()]))
    state = zeroed(example())
    with S3StorageReader("us-east-1", uri, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_load_of_files_with_prefixes_written_by_several_threads(bucket: str, constructor: Any) -> None:
    uri = f"s3://{bucket}/spread/"
    strategy = HexPrefixStrategy(epoch_num=4)
    save(example(), storage_writer=S3StorageWriter("us-east-1", uri, prefix_strategy=strategy, thread_count=3))
    files = S3FileSystem().ls(uri)
    assert f"s3://{bucket}/spread/{'0' * 10}/epoch_4/__0_2.distcp" in files
    assert len(files) == 4
    state = zeroed(example())
    with S3StorageReader("us-east-1", uri, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_reader_serves_several_loads_and_checkpoints(checkpoint: str, bucket: str, constructor: Any) -> None:
    other = f"s3://{bucket}/runs/two"
    save({"w": torch.arange(9)}, storage_writer=S3StorageWriter("us-east-1", other))
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        for _ in range(2):
            state = zeroed(example())
            load(state, storage_reader=reader, checkpoint_id=checkpoint)
            assert_same(state, example())
            small = {"w": torch.zeros(9, dtype=torch.int64)}
            load(small, storage_reader=reader, checkpoint_id=other)
            assert_same(small, {"w": torch.arange(9)})


@pytest.mark.parametrize("path", ["/a b+c/ü%20/../d//", "//", "/"])
def test_checkpoint_path_may_be_any_key(bucket: str, constructor: Any, path: str) -> None:
    uri = f"s3://{bucket}{path}"
    save({"w": torch.arange(9)}, storage_writer=S3StorageWriter("us-east-1", uri))
    assert S3FileSystem().ls(uri) == [f"{uri}.metadata", f"{uri}__0_0.distcp"]
    state = {"w": torch.zeros(9, dtype=torch.int64)}
    with S3StorageReader("us-east-1", uri, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, {"w": torch.arange(9)})


def test_readers_that_share_a_constructor_keep_their_own_settings(checkpoint: str) -> None:
    constructor = S3ReaderConstructor.multiprocess(pool_config=POOL)
    reader = S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor)
    elsewhere = S3ClientConfig(endpoint_url="http://127.0.0.1:1", max_attempts=1)
    with reader, S3StorageReader("us-east-1", checkpoint, elsewhere, reader_constructor=constructor):
        state = zeroed(example())
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_reader_serves_a_load_after_one_that_failed(
    checkpoint: str, bucket: str, constructor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        with pytest.raises(CheckpointException):
            load({"w": torch.zeros(1)}, storage_reader=reader, checkpoint_id=f"s3://{bucket}/missing")
        with pytest.raises(CheckpointException):
            load({"int16": torch.zeros(4, 4)}, storage_reader=reader, checkpoint_id=checkpoint)
        state = zeroed(example())
        load(state, storage_reader=reader, checkpoint_id=checkpoint)
    assert_same(state, example())
    caplog.clear()  # torch logs the exceptions, and with them the frames that hold connections


def test_reader_pickles(checkpoint: str, constructor: Any) -> None:
    with S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader:
        load(zeroed(example()), storage_reader=reader)
        copy: S3StorageReader = pickle.loads(pickle.dumps(reader))
    state = zeroed(example())
    with copy:
        load(state, storage_reader=copy)
    assert_same(state, example())


class RecordingPlanner(DefaultLoadPlanner):
    """Redirects what it is asked for, as planners may."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.calls.append(f"bytes {read_item.dest_index.fqn}")
        super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self.calls.append(f"resolve {read_item.dest_index.fqn}")
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.calls.append(f"commit {read_item.dest_index.fqn}")
        super().commit_tensor(read_item, tensor)


def test_planner_is_called_as_torch_calls_it(checkpoint: str) -> None:
    planners = RecordingPlanner(), RecordingPlanner()
    kinds = "dcp_optimized", "multiprocess"
    for planner, kind in zip(planners, kinds, strict=True):
        with S3StorageReader("us-east-1", checkpoint, reader_constructor=CONSTRUCTORS[kind]()) as reader:
            load(zeroed(example()), storage_reader=reader, planner=planner)
    assert planners[0].calls == planners[1].calls != []


def files_with(uri: str, name: str) -> dict[str, bytes]:
    fs = S3FileSystem()
    contents = {}
    for file in fs.ls(uri):
        if name in file:
            with fs.create_stream(file, "rb") as stream:
                contents[file] = bytes(stream.read())
    return contents


def replace_bytes(uri: str, name: str, old: bytes, new: bytes) -> None:
    """Change an object behind S3's back, as bit rot does."""
    [(file, data)] = files_with(uri, name).items()
    assert data.count(old) == 1
    with S3FileSystem().create_stream(file, "wb") as stream:
        stream.write(data.replace(old, new))


@pytest.mark.parametrize("extensions", [None, [ZStandard()]], ids=["plain", "compressed"])
@pytest.mark.row("bit flipped in a tensor's bytes")
def test_flipped_bit_raises_checksum_mismatch_naming_the_tensor(bucket: str, extensions: Any) -> None:
    uri = f"s3://{bucket}/damaged"
    noise = torch.randint(0, 256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    state = {"a": torch.zeros(3), "some.weight": noise}
    save(state, storage_writer=S3StorageWriter("us-east-1", uri, _extensions=extensions))
    old = bytes(noise[2000:2010].tolist())
    new = bytes([old[0] ^ 1]) + old[1:]
    replace_bytes(uri, "__0_0.distcp", old, new)
    state = {"a": torch.ones(3), "some.weight": torch.zeros_like(noise)}
    with S3StorageReader("us-east-1", uri, pool_config=POOL) as reader:
        with pytest.raises(CheckpointException) as raised:
            load(state, storage_reader=reader)
        [error] = [failure[0] for failure in raised.value.failures.values()]
        assert isinstance(error, ChecksumMismatch)
        assert "some.weight" in str(error)
        assert (error.bucket, error.key) == (bucket, "damaged/__0_0.distcp")
        assert error.range is not None
    with S3StorageReader("us-east-1", uri, pool_config=POOL, verify=False) as reader:
        load(state, storage_reader=reader)
    assert bytes(state["some.weight"][2000:2010].tolist()) == new


@pytest.mark.row("bit flipped in a tensor's bytes")
def test_flipped_bit_in_a_record_for_torch_load_raises_too(bucket: str) -> None:
    uri = f"s3://{bucket}/damaged"
    stored = torch.tensor([1 + 2j, 3 - 4j]).conj()  # not a plain tensor: saved with its conjugate bit
    save({"w": stored}, storage_writer=S3StorageWriter("us-east-1", uri))
    state = {"w": torch.zeros_like(stored)}
    with S3StorageReader("us-east-1", uri, pool_config=POOL) as reader:
        load(state, storage_reader=reader)
    assert state["w"].tolist() == [1 - 2j, 3 + 4j]
    old, new = (torch.tensor(values).numpy().tobytes() for values in ([3.0, -4.0], [3.5, -4.0]))
    replace_bytes(uri, "__0_0.distcp", old, new)
    with (
        S3StorageReader("us-east-1", uri, pool_config=POOL) as reader,
        pytest.raises(CheckpointException, match="ChecksumMismatch"),
    ):
        load(state, storage_reader=reader)


@pytest.mark.row("bit flipped in a tensor's bytes")
def test_flipped_bit_in_another_object_than_a_tensor_raises_too(bucket: str) -> None:
    uri = f"s3://{bucket}/damaged"
    save({"run": {"name": "marker of this run"}}, storage_writer=S3StorageWriter("us-east-1", uri))
    replace_bytes(uri, "__0_0.distcp", b"marker of this run", b"barker of this run")
    with (
        S3StorageReader("us-east-1", uri, pool_config=POOL) as reader,
        pytest.raises(CheckpointException, match="ChecksumMismatch"),
    ):
        load({"run": {"name": ""}}, storage_reader=reader)


def test_checkpoint_of_ranks_that_save_on_their_own(
    bucket: str, constructor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"s3://{bucket}/own"
    writer = S3StorageWriter("us-east-1", uri, prefix_strategy=HexPrefixStrategy(min_prefix_length=2))
    save(example(), storage_writer=writer, use_collectives=False)
    assert [file.removeprefix(uri) for file in S3FileSystem().ls(uri)] == ["/00/__0_0.distcp", "/__0.metadata"]
    state = zeroed(example())
    with S3StorageReader("us-east-1", uri, reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())
    caplog.clear()  # torch logs that there is no common .metadata, and with it frames that hold connections


def test_ranks_that_save_on_their_own_write_files_of_different_names(bucket: str) -> None:
    writer = S3StorageWriter("us-east-1", f"s3://{bucket}/own")
    prefixes = []
    for rank in range(3):
        writer.set_up_storage_writer(True, rank=rank, use_collectives=False)
        # Each rank plans for itself: the global plan that it makes is of its own plan only.
        [plan] = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan([]))])
        prefixes.append(plan.storage_data.prefix)
    assert prefixes == ["__0_", "__1_", "__2_"]


@pytest.mark.row("hostile .metadata")
def test_hostile_metadata_is_refused_before_anything_is_read(checkpoint: str, constructor: Any) -> None:
    data = files_with(checkpoint, ".metadata").popitem()[1]
    for hostile, reason in (
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
        (data.replace(b"__0_0.distcp", b"../../secret"), "outside"),
    ):
        with S3FileSystem().create_stream(f"{checkpoint}/.metadata", "wb") as stream:
            stream.write(hostile)
        with (
            S3StorageReader("us-east-1", checkpoint, reader_constructor=constructor) as reader,
            pytest.raises(MetadataRefused, match=reason),
        ):
            reader.read_metadata()


def test_writer_refuses_to_overwrite_when_told_so(checkpoint: str) -> None:
    with pytest.raises(CheckpointException, match="already exists"):
        save({"w": torch.ones(1)}, storage_writer=S3StorageWriter("us-east-1", checkpoint, overwrite=False))


class Prefix(S3PrefixStrategyBase):
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def generate_prefix(self, rank: int) -> str:
        return self.prefix


@pytest.mark.parametrize("prefix", ["/a/", "../", "a/../b", "./"])
def test_writer_refuses_a_prefix_that_could_not_be_loaded(prefix: str) -> None:
    writer = S3StorageWriter("us-east-1", "s3://bucket/outside", prefix_strategy=Prefix(prefix))
    with pytest.raises(ConfigError, match="outside of the checkpoint"):
        writer.prepare_global_plan([SavePlan([])])


def test_writer_refuses_the_same_prefix_for_two_ranks() -> None:
    writer = S3StorageWriter("us-east-1", "s3://bucket/same", prefix_strategy=Prefix("a/"))
    with pytest.raises(ConfigError, match="same prefix"):
        writer.prepare_global_plan([SavePlan([]), SavePlan([])])


# torch lets a writing thread die and only prints why.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("thread_count", [1, 3])
def test_writer_that_fails_leaves_no_checkpoint(bucket: str, thread_count: int) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            raise OSError("can't be saved")

    uri = f"s3://{bucket}/failed"
    state = {"a": torch.ones(1), "b": Unsaveable(), "c": torch.ones(2)}
    with pytest.raises(CheckpointException):
        save(state, storage_writer=S3StorageWriter("us-east-1", uri, thread_count=thread_count))
    assert ".metadata" not in [Path(file).name for file in S3FileSystem().ls(uri)]


def test_checkpoint_written_to_disk_loads_from_s3(bucket: str, tmp_path: Path, constructor: Any) -> None:
    save(example(), storage_writer=FileSystemWriter(tmp_path))
    for file in tmp_path.iterdir():
        with S3FileSystem().create_stream(f"s3://{bucket}/{file.name}", "wb") as stream:
            stream.write(file.read_bytes())
    state = zeroed(example())
    with S3StorageReader("us-east-1", f"s3://{bucket}", reader_constructor=constructor) as reader:
        load(state, storage_reader=reader)
    assert_same(state, example())


def test_checkpoint_written_to_s3_loads_from_disk(checkpoint: str, tmp_path: Path) -> None:
    for file, data in files_with(checkpoint, "").items():
        (tmp_path / Path(file).name).write_bytes(data)
    state = zeroed(example())
    load(state, storage_reader=FileSystemReader(tmp_path))
    assert_same(state, example())


def test_reader_refuses_pool_settings_beside_a_constructor() -> None:
    with pytest.raises(ConfigError, match="pool_config"):
        S3StorageReader(None, "s3://b/k", reader_constructor=S3ReaderConstructor.sequential(), pool_config=POOL)


def test_metadata_of_a_rank_is_not_loaded_in_place_of_what_is_damaged(bucket: str) -> None:
    uri, other = f"s3://{bucket}/new", f"s3://{bucket}/old"
    for where, content in ((uri, torch.arange(3)), (other, torch.arange(3) * 10)):
        save({"w": content}, storage_writer=S3StorageWriter("us-east-1", where))
    fs = S3FileSystem("us-east-1")
    with fs.create_stream(f"{uri}/.metadata", "rb") as stream:
        of_rank = stream.read()
    with fs.create_stream(f"{uri}/__0.metadata", "wb") as stream:
        stream.write(of_rank)
    with fs.create_stream(f"{uri}/.metadata", "wb") as stream:
        stream.write(of_rank[:-40])
    state = {"w": torch.zeros(3, dtype=torch.int64)}
    with S3StorageReader("us-east-1", uri, pool_config=POOL) as reader:
        with pytest.raises(CheckpointException, match="is damaged"):
            load(state, storage_reader=reader)
        assert not state["w"].any()
        load(state, storage_reader=reader, checkpoint_id=other)
        assert state["w"].tolist() == [0, 10, 20]
        fs.rm_file(f"{uri}/.metadata")
        load(state, storage_reader=reader, checkpoint_id=uri)  # as torch has it, where there is none
        assert state["w"].tolist() == [0, 1, 2]
    fs.close()
