"""Ranks of a host that load safetensors files together, with and without torch.distributed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mpreader import ConfigError
from mpreader.safetensors import load_file
from tests.integration.dcp.test_sharded_jobs import JOBS, PRELOAD

if TYPE_CHECKING:
    from mpreader.testing import S3Server
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NBYTES = 3 * 2048 * 256 * 4  # of the large tensors

PROGRAM = """
import boto3, json
from safetensors.torch import save
from mpreader.pool.hosts.meeting import meet
from mpreader.safetensors import load_checkpoint

POOL = PoolConfig(workers=1, connections_per_worker=4, max_memory=16 * 2**20, part_size=2**20)
TENSORS = {f"weight{number}": torch.arange(2048 * 256.0).view(2048, 256) + number for number in range(3)}
TENSORS |= {"scalar": torch.tensor(2.5), "empty": torch.empty(3, 0)}
bucket, _, folder_of_job = uri.removeprefix("s3://").partition("/")

def load(case, rank, **options):
    # Under names of their own, so that the server's log tells which case has asked.
    return load_checkpoint(f"{uri}/{case}", pool_config=POOL, **options)

def put(case):
    client = boto3.client("s3")
    for number in range(2):
        some = dict(list(TENSORS.items())[number::2])
        client.put_object(Bucket=bucket, Key=f"{folder_of_job}/{case}/{number}.safetensors", Body=save(some))
    client.close()

def put_folders():
    client, weights = boto3.client("s3"), {}
    for name, folder_of_file in {"weight0": "a", "weight1": "b", "scalar": "b/c"}.items():
        # Files of the same name, in folders of their own.
        key = f"{folder_of_job}/folders/{folder_of_file}/x.safetensors"
        client.put_object(Bucket=bucket, Key=key, Body=save({name: TENSORS[name]}))
        weights[name] = f"{folder_of_file}/x.safetensors"
    index = json.dumps({"weight_map": weights})
    client.put_object(Bucket=bucket, Key=f"{folder_of_job}/folders/model.safetensors.index.json", Body=index)
    client.close()

def check(found, expected):
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name

def rows_of(rank):
    return {name: slice(512 * rank, 512 * (rank + 1)) for name in TENSORS if name.startswith("weight")}

def sharded(rank, dim):
    part = lambda tensor: tensor.chunk(4, dim)[rank]
    return {name: part(tensor) if tensor.dim() == 2 and tensor.numel() else tensor for name, tensor in TENSORS.items()}

def all_cases():
    rank = dist.get_rank()
    columns = {name: (..., slice(64 * rank, 64 * (rank + 1))) for name in rows_of(rank)}
    check(load("whole", rank, share_host=True), TENSORS)
    check(load("rows", rank, share_host=True, slices=rows_of(rank)), sharded(rank, 0))
    check(load("columns", rank, share_host=True, slices=columns), sharded(rank, 1))
    names = ["weight0"] if rank == 2 else []
    check(load("some", rank, share_host=True, names=names), {name: TENSORS[name] for name in names})
    names = [["weight0", "weight1"], ["weight1", "scalar"], [], ["scalar", "weight0"]][rank]
    check(load("folders", rank, share_host=True, names=names), {name: TENSORS[name] for name in names})
    mesh = init_device_mesh("cpu", (4,))
    out = {name: DTensor.from_local(torch.zeros(512, 256), mesh, [Shard(0)]) for name in rows_of(rank)}
    load("dtensors", rank, share_host=True, out=out)
    for name, tensor in out.items():
        assert torch.equal(tensor.to_local(), sharded(rank, 0)[name])
    try:
        load("error", rank, share_host=True, names=["none"] if rank == 1 else ["weight0"])
    except ValueError as error:
        assert rank == 1 and "no tensor 'none' is in" in str(error)
    else:
        assert rank != 1
    half = {name: tensor.half() for name, tensor in TENSORS.items()}
    check(load("named", rank, share_host=folder, dtype=torch.float16), half)
    dist.barrier()  # the rank that leads must not end before the others have what they want

def by_name_only(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    for _ in range(2):  # the same name once more
        check(load("alone", rank, share_host=f"{folder} again", slices=rows_of(rank)), sharded(rank, 0))
    meet(f"{folder} end", 4, None)

def run_by_name():
    pids = []
    for rank in range(4):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                by_name_only(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    assert not any([os.waitpid(pid, 0)[1] for pid in pids])

for case in ("whole", "rows", "columns", "some", "dtensors", "error", "named", "alone"):
    put(case)
put_folders()
run_job(4, all_cases)
run_by_name()
"""


@pytest.fixture
def asked(
    bucket: str, s3_server: S3Server, tmp_path: Path, warm_interpreter: WarmInterpreter
) -> dict[str, list[tuple[int, int]]]:
    """Ranges that the server was asked for, by case."""
    script = tmp_path / "job.py"
    script.write_text(JOBS + PROGRAM)
    before = len(s3_server.requests)
    done = warm_interpreter.run(script, f"s3://{bucket}/job", tmp_path, preload=PRELOAD)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[int, int]]] = {}
    for one in s3_server.requests[before:]:
        case = re.search(r"/job/(\w+)/\d", one.path)
        border = re.fullmatch(r"bytes=(\d+)-(\d+)", one.range or "")
        if case and border and one.method == "GET":
            found.setdefault(case[1], []).append((int(border[1]), int(border[2]) + 1))
    return found


def test_ranks_receive_each_byte_once(asked: dict[str, list[tuple[int, int]]]) -> None:
    # All cases are of one job, which takes seconds. Besides the tensors each rank asks for the headers.
    headers = 4 * 2 * 256 * 1024
    for case, loads in {"whole": 1, "rows": 1, "columns": 1, "dtensors": 1, "named": 1, "alone": 2}.items():
        received = sum(end - start for start, end in asked[case])
        scalar = 4
        assert loads * NBYTES < received <= loads * (NBYTES + headers + scalar), (case, sorted(asked[case]))
    assert sum(end - start for start, end in asked["some"]) <= NBYTES // 3 + headers + 4


def test_ranks_that_cannot_find_each_other_are_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for options, message in {
        json.dumps({"share_host": True}): r"call init_process_group first, or write share_host=\"a name",
        json.dumps({"share_host": "name"}): "host_ranks must say how many ranks",
        json.dumps({"share_host": "name", "host_ranks": 0}): "host_ranks is a number of ranks, at least 1, got 0",
        json.dumps({"host_ranks": 2}): "write share_host=True, or a name",
    }.items():
        arguments: dict[str, Any] = json.loads(options)
        with pytest.raises(ConfigError, match=message):
            load_file("s3://bucket/a.safetensors", **arguments)
    with pytest.raises(ConfigError, match="from s3:// only"):
        load_file("/tmp/a.safetensors", share_host="name", host_ranks=2)
