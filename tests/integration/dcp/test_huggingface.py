"""State dicts from safetensors files on S3; torch's reader of local files is the judge, where this torch has one."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
import torch
from safetensors.torch import save
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from mpreader import ObjectChanged, ObjectMissing, PoolConfig
from mpreader.config import MiB
from mpreader.dcp import S3HuggingFaceStorageReader
from mpreader.formats.torch_tensors import TORCH_DTYPES
from mpreader.safetensors import HeaderRefused
from tests.integration.dcp.test_hosts import NEEDED, NUMBERED, RANKS
from tests.integration.dcp.test_sharded_jobs import JOBS, PRELOAD

if TYPE_CHECKING:
    from mpreader.testing import S3Server
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TorchReader = getattr(checkpoint, "HuggingFaceStorageReader", None)  # torch 2.8 and newer
POOL = PoolConfig(workers=1, connections_per_worker=4, max_memory=16 * MiB, part_size=MiB)

UNJUDGED = ("F4", "F8_E8M0")  # torch's reader does not know them
TENSORS: dict[str, torch.Tensor] = {
    **{
        str(dtype): torch.arange(64, dtype=torch.uint8).view(dtype).reshape(-1, 2)
        for name, dtype in TORCH_DTYPES.items()
        if name not in (*UNJUDGED, "BOOL") and not name.startswith("F6")
    },
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "tiny": torch.tensor([1.0]),
    "large": torch.arange(3 * MiB // 4, dtype=torch.float32).view(-1, 256),
}
PIECES = ((0, 0), (0, 300), (700, 0), (700, 300))  # where those of "grid" begin
GRID = torch.arange(1000 * 500, dtype=torch.float32).view(1000, 500)


def whole_files() -> dict[str, bytes]:
    """Returns files of whole tensors."""
    return {f"model-{start}.safetensors": save(dict(list(TENSORS.items())[start::2])) for start in range(2)}


def files_of_pieces() -> dict[str, bytes]:
    """Returns files as torch's writer lets each rank save one."""
    files = {}
    for rank, (row, column) in enumerate(PIECES):
        piece = GRID[row : 1000 if row else 700, column : 500 if column else 300].contiguous()
        offsets = {"grid": {"saved_offsets": [row, column]}}
        tensors = {"grid": piece}
        if rank == 1:
            tensors["scalar"], offsets["scalar"] = torch.tensor(2.5), {"saved_offsets": []}
        files[f"shard-{rank:05}-model-00001-of-00001.safetensors"] = save(
            tensors, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"}
        )
    return files


def put(bucket: str, folder: str, files: dict[str, bytes]) -> str:
    client = boto3.client("s3")
    for name, body in files.items():
        client.put_object(Bucket=bucket, Key=f"{folder}/{name}", Body=body)
    client.close()
    return f"s3://{bucket}/{folder}"


def reader_of(uri: str) -> S3HuggingFaceStorageReader:
    return S3HuggingFaceStorageReader(None, uri, pool_config=POOL)


def empty_like(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(one.shape, dtype=dtype if dtype and one.dtype == torch.float32 else one.dtype)
        for name, one in tensors.items()
    }


def loaded(uri: str, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with reader_of(uri) as reader:
        load(targets, storage_reader=reader, no_dist=True)
    return targets


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        pair = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
        assert torch.equal(*pair), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "pieces"])
def test_state_dict_is_that_of_torchs_reader(kind: str, dtype: torch.dtype | None, bucket: str, tmp_path: Path) -> None:
    files = whole_files() if kind == "whole" else files_of_pieces()
    expected = TENSORS if kind == "whole" else {"grid": GRID, "scalar": torch.tensor(2.5)}
    found = loaded(put(bucket, "model", files), empty_like(expected, dtype))
    assert_same(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()})
    if TorchReader is not None:
        for name, body in files.items():
            (tmp_path / name).write_bytes(body)
        judged = empty_like(expected, dtype)
        load(judged, storage_reader=TorchReader(str(tmp_path)), no_dist=True)
        assert_same(found, judged)


def test_single_file_and_types_that_torchs_reader_lacks_are_loaded(bucket: str) -> None:
    uri = put(bucket, "one", {"a.safetensors": save(TENSORS), "b.safetensors": b"not a file of tensors"})
    assert_same(loaded(f"{uri}/a.safetensors", empty_like({"large": TENSORS["large"]})), {"large": TENSORS["large"]})
    new = {name: torch.arange(256, dtype=torch.uint8).view(16, 16) for name in UNJUDGED if name in TORCH_DTYPES}
    stored = {name: tensor.view(TORCH_DTYPES[name]) for name, tensor in new.items()}
    found = {name: torch.zeros_like(tensor).view(TORCH_DTYPES[name]) for name, tensor in new.items()}
    assert_same(loaded(put(bucket, "new", {"a.safetensors": save(stored)}), found), stored)


def test_index_says_which_files_are_read(bucket: str) -> None:
    files = whole_files()
    index = {"weight_map": dict.fromkeys(TENSORS, "model-0.safetensors") | {"large": "model-1.safetensors"}}
    files["other.safetensors"] = save({"large": torch.zeros(1)})
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert_same(loaded(put(bucket, "model", files), empty_like(TENSORS)), TENSORS)


def test_headers_of_more_files_than_memory_has_room_for_are_read(bucket: str) -> None:
    tensors = {f"w{number}": torch.full((70_000,), float(number)) for number in range(40)}
    uri = put(bucket, "many", {f"{name}.safetensors": save({name: tensor}) for name, tensor in tensors.items()})
    small = PoolConfig(workers=1, connections_per_worker=4, max_memory=8 * MiB, part_size=MiB)
    with S3HuggingFaceStorageReader(None, uri, pool_config=small) as reader:
        assert reader.read_metadata().state_dict_metadata.keys() == tensors.keys()


class Targets(DefaultLoadPlanner):
    """Planner of a program that makes its items by itself: has a target for each."""

    def __init__(self, targets: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self._targets[read_item.dest_index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def test_program_that_plans_by_itself_loads_slices_and_tensors_without_elements(bucket: str) -> None:
    nothing = torch.empty(3, 0)
    uri = put(bucket, "model", {**whole_files(), "z.safetensors": save({"nothing": nothing})})
    targets = {"large": torch.zeros(500, 256), "empty": torch.zeros(0, 3), "nothing": torch.zeros(3, 0)}
    origin, items = torch.Size([0, 0]), []
    for name, target in targets.items():
        index, starts = MetadataIndex(name, origin), torch.Size([1000 if name == "large" else 0, 0])
        items.append(ReadItem(LoadItemType.TENSOR, index, origin, index, starts, target.shape))
    with pickle.loads(pickle.dumps(reader_of(uri))) as reader:
        reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
        plan = reader.prepare_local_plan(LoadPlan(items))
        reader.read_data(plan, Targets(targets)).wait()
        assert reader.stats.bytes == 500 * 256 * 4, "not a byte more"
    assert_same(targets, {"large": TENSORS["large"][1000:1500], "empty": TENSORS["empty"], "nothing": nothing})


class Overwriting(DefaultLoadPlanner):
    """Planner that does something between the reading of the headers and that of the data."""

    def __init__(self, overwrite: Callable[[], object]) -> None:
        super().__init__()
        self._overwrite = overwrite

    def create_local_plan(self) -> LoadPlan:
        self._overwrite()
        return super().create_local_plan()


def test_object_that_is_overwritten_behind_its_header_is_not_read(bucket: str) -> None:
    uri = put(bucket, "model", {"a.safetensors": save({"weight": GRID})})
    planner = Overwriting(lambda: put(bucket, "model", {"a.safetensors": save({"weight": GRID + 1})}))
    with reader_of(uri) as reader, pytest.raises(CheckpointException) as caught:
        load({"weight": torch.zeros(GRID.shape)}, storage_reader=reader, planner=planner, no_dist=True)
    assert isinstance(caught.value.failures[0][0], ObjectChanged)


def test_errors_name_what_is_wrong(bucket: str) -> None:
    pieces = files_of_pieces()
    first = next(iter(pieces))
    lost = {name: body for name, body in pieces.items() if name != first}
    with reader_of(put(bucket, "lost", lost)) as reader:
        with pytest.raises(HeaderRefused, match=r"pieces of 'grid', in .* have 290000 elements, .* a file is missing"):
            reader.read_metadata()
        reader.reset(put(bucket, "twice", {**pieces, "copy.safetensors": pieces[first]}))
        with pytest.raises(HeaderRefused, match=rf"'grid' is in copy\.safetensors and in {first}: the same piece"):
            reader.read_metadata()
        reader.reset(f"s3://{bucket}/nothing")
        with pytest.raises(ObjectMissing, match=r"no \.safetensors file"):
            reader.read_metadata()
        # The error of a load has the reason in its text.
        with pytest.raises(CheckpointException, match=r"no \.safetensors file"):
            load({"grid": GRID}, storage_reader=reader, no_dist=True)


CASES = """
import json
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, zeros
import boto3
from safetensors.torch import save as save_file
from mpreader.dcp import S3HuggingFaceStorageReader

def put_files(case, add=0):
    client = boto3.client("s3")
    for name, numbers in (("a", (0, 1)), ("b", (2, 3))):
        body = save_file({NAMES[number]: expected(number) + add for number in numbers})
        client.put_object(Bucket=uri.split("/")[2], Key=f"job/{case}/{name}.safetensors", Body=body)
    client.close()

def load_case(case, placements, shape=(4,), **options):
    rank = dist.get_rank()
    if not rank:
        put_files(case)
    mesh = init_device_mesh("cpu", shape)
    state = {name: zeros(1024, 512, device_mesh=mesh, placements=placements) for name in NAMES}
    dist.barrier()
    with S3HuggingFaceStorageReader(None, f"{uri}/{case}", pool_config=POOL, **options) as reader:
        dcp.load(state, storage_reader=reader)
        stats = reader.stats
    for number, name in enumerate(NAMES):
        assert torch.equal(state[name].full_tensor(), expected(number)), (case, name)
    tell(case, bytes=stats.bytes, verified=stats.verified_bytes)

def tell(case, **facts):
    told = json.dumps({"case": case, "rank": dist.get_rank(), **facts})
    os.write(1, f"told {told}\\n".encode())
    dist.barrier()

class Late(S3HuggingFaceStorageReader):
    # The rank that leads reads its headers when the files have been overwritten.
    def read_metadata(self):
        if dist.get_rank():
            metadata = super().read_metadata()
        dist.barrier()
        if not dist.get_rank():
            put_files("changed", add=1)
            metadata = super().read_metadata()
        dist.barrier()
        return metadata

def load_changed():
    rank = dist.get_rank()
    if not rank:
        put_files("changed")
    dist.barrier()
    state = {name: torch.zeros(1024, 512) for name in NAMES}
    failures = {}
    with Late(None, f"{uri}/changed", pool_config=POOL) as reader:
        try:
            dcp.load(state, storage_reader=reader)
        except CheckpointException as error:
            failures = {rank: type(failure[0]).__name__ for rank, failure in error.failures.items()}
    tell("changed", failures=failures)

def load_fsdp():
    model = nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16)
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)))
    state = {NAMES[0]: model.state_dict()["weight"]}
    with S3HuggingFaceStorageReader(None, f"{uri}/rows", pool_config=POOL) as reader:
        dcp.load(state, storage_reader=reader)
    assert torch.equal(model.weight.full_tensor(), expected(0).bfloat16())

def load_written_by_torch():
    mesh = init_device_mesh("cpu", (4,))
    state = {"weight": DTensor.from_local(expected(0).chunk(4)[dist.get_rank()], mesh, [Shard(0)])}
    writer = dcp.HuggingFaceStorageWriter(f"{folder}/written", save_distributed=True)
    dcp.save(state, storage_writer=writer)
    if not dist.get_rank():
        client = boto3.client("s3")
        for name in os.listdir(f"{folder}/written"):
            client.upload_file(f"{folder}/written/{name}", uri.split("/")[2], f"job/written/{name}")
        client.close()
    dist.barrier()
    state = {"weight": zeros(1024, 512, device_mesh=mesh, placements=[Shard(1)])}
    with S3HuggingFaceStorageReader(None, f"{uri}/written", pool_config=POOL) as reader:
        dcp.load(state, storage_reader=reader)
    assert torch.equal(state["weight"].full_tensor(), expected(0))

def load_all():
    load_case("replica", [Replicate()])
    load_case("rows", [Shard(0)])
    load_case("columns", [Shard(1)])
    load_case("hsdp", [Replicate(), Shard(0)], (2, 2))
    load_case("alone", [Shard(0)], share_host=False)
    load_changed()
    load_fsdp()
    if hasattr(dcp, "HuggingFaceStorageWriter"):
        load_written_by_torch()

run_job(4, load_all)
"""


def asked_bytes(server: S3Server, before: int, case: str) -> int:
    """Returns how many bytes of data were asked for: of ranges that begin behind the header."""
    chosen = [one for one in server.requests[before:] if f"/{case}/" in one.path and one.method == "GET"]
    borders = [re.fullmatch(r"bytes=(\d+)-(\d+)", one.range or "") for one in chosen]
    return sum(int(border[2]) + 1 - int(border[1]) for border in borders if border and border[1] != "0")


def test_ranks_of_a_host_receive_each_byte_once(
    bucket: str, s3_server: S3Server, tmp_path: Path, warm_interpreter: WarmInterpreter
) -> None:
    # The job takes seconds, so that all cases are of one job.
    script = tmp_path / "job.py"
    script.write_text(JOBS + NUMBERED + CASES)
    before = len(s3_server.requests)
    done = warm_interpreter.run(script, f"s3://{bucket}/job", tmp_path, preload=PRELOAD)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("told ")]
    ratios = {case: asked_bytes(s3_server, before, case) / NEEDED for case in ("replica", "columns", "hsdp", "alone")}
    assert all(1.0 <= ratio <= 1.02 for ratio in ratios.values()), ratios
    shared = [one for one in told if one["case"] in ("replica", "rows", "columns", "hsdp")]
    assert all((one["bytes"] > 0) == (one["rank"] == 0) for one in shared), "the first rank receives for all"
    assert not any(one["verified"] for one in shared), "there are no checksums"
    changed = [one["failures"] for one in told if one["case"] == "changed"]
    assert changed == [dict.fromkeys(("1", "2", "3"), "ObjectChanged")] * RANKS
