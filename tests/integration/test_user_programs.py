"""Programs that load as users write them: without a main guard, in a DataLoader worker, under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp import S3StorageWriter

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

REGION = "us-east-1"
TENSORS = 24


@pytest.fixture
def checkpoint(bucket: str) -> str:
    """URI of a checkpoint of 24 MB: tensor i is full of i."""
    state = {f"w{i}": torch.full((256, 1024), float(i)) for i in range(TENSORS)}
    uri = f"s3://{bucket}/checkpoint"
    save(state, storage_writer=S3StorageWriter(REGION, uri, thread_count=2), no_dist=True)
    return uri


LOAD = f"""
import sys, warnings
import torch, torch.distributed.checkpoint as dcp
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
from mpreader import PoolConfig
from mpreader.dcp import S3StorageReader

def load(uri):
    state = {{f"w{{i}}": torch.zeros(256, 1024) for i in range({TENSORS})}}
    reader = S3StorageReader("{REGION}", uri, pool_config=PoolConfig(workers=2, max_memory=16 * 2**20))
    dcp.load(state, storage_reader=reader, no_dist=True)
    return all(bool((state[f"w{{i}}"] == i).all()) for i in range({TENSORS}))
"""


def run(program: list[str], stdin: str | None = None) -> str:
    """Run a program in a session of its own; it must succeed silently and leave nothing of its session behind."""
    process = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(stdin, timeout=120)
    assert (process.returncode, err) == (0, ""), err
    return out


@pytest.mark.row("no __main__ guard, stdin, daemonic process")
def test_script_without_main_guard_loads_whatever_lies_in_the_working_folder(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that looked into the working folder would import these. (Python's own resource tracker does look there.)
    for name in ("mmap", "ssl", "email"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the standard library')\n")
    script = tmp_path / "programs" / "script.py"
    script.parent.mkdir()
    script.write_text(LOAD + f"print(load({checkpoint!r}))\n")
    monkeypatch.chdir(tmp_path)
    assert run([sys.executable, str(script)]) == "True\n"


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
@pytest.mark.row("no __main__ guard, stdin, daemonic process", "fork of the program after use", within_s=60)
def test_dataloader_worker_loads(
    checkpoint: str, tmp_path: Path, warm_interpreter: WarmInterpreter, start_method: str
) -> None:
    module = tmp_path / "dataset.py"
    module.write_text(
        LOAD
        + f"""
class Dataset(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield load({checkpoint!r})

if __name__ == "__main__":
    if {start_method == "fork"}:  # also after this process has used its own pool
        assert load({checkpoint!r})
    loader = torch.utils.data.DataLoader(Dataset(), num_workers=1, multiprocessing_context={start_method!r})
    print([bool(item) for item in loader], load({checkpoint!r}))
"""
    )
    done = warm_interpreter.run(module)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[True] True\n")


TORCHRUN = f"""
import os, sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from mpreader import PoolConfig, S3ReaderConstructor
from mpreader.dcp import S3StorageReader, S3StorageWriter

dist.init_process_group("gloo")
rank, everyone = dist.get_rank(), init_device_mesh("cpu", (3,))
two = DeviceMesh("cpu", [0, 1])

def state(scale, mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.Linear(128, 50, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    fully_shard(model, mesh=mesh)
    table = distribute_tensor(torch.arange(7 * 33, dtype=torch.float32).reshape(7, 33) * scale, mesh, [Shard(1)])
    return {{"model": model.state_dict(), "table": table, "replica": torch.arange(1000.0) * scale, "step": 7 * scale}}

def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value

if rank < 2:
    dcp.save(state(1, two), storage_writer=S3StorageWriter("{REGION}", sys.argv[1]), process_group=two.get_group())
dist.barrier()
constructor = S3ReaderConstructor.multiprocess(pool_config=PoolConfig(max_memory=8 * 2**20))
expected, loaded = state(1, everyone), state(0, everyone)
dcp.load(loaded, storage_reader=S3StorageReader("{REGION}", sys.argv[1], reader_constructor=constructor))
for name, value in expected["model"].items():
    assert torch.equal(whole(loaded["model"][name]), whole(value)), name
assert torch.equal(whole(loaded["table"]), whole(expected["table"]))
assert torch.equal(loaded["replica"], expected["replica"]) and loaded["step"] == 7
constructor.close()
os.write(1, f"rank {{rank}} loaded\\n".encode())
dist.barrier()
# Not destroy_process_group(): gloo of torch 2.13 aborts in about one of ten such exits, also without mpreader.
os._exit(0)
"""


def test_shards_of_two_ranks_are_loaded_by_three(bucket: str, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(script)]
    done = subprocess.run(
        [*command, f"s3://{bucket}/sharded"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert lines == ["rank 0 loaded", "rank 1 loaded", "rank 2 loaded"]
