"""Ranks of one host with odd records, little memory, other numbers of ranks, and what they tell of the load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.dcp.test_sharded_jobs import JOBS, PRELOAD, asked

if TYPE_CHECKING:
    from mpreader.testing import S3Server
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

HELPERS = """
import json, logging
from torch.distributed.tensor import Replicate, distribute_tensor, zeros
from mpreader import record_timeline

POOL = PoolConfig(workers=1, connections_per_worker=4, max_memory=8 * 2**20, part_size=2**20)

def numbered(rows, columns, first=0):
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + first

class Alone(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        if "by itself" in record.getMessage():
            self.lines.append(record.getMessage())

alone = Alone()
logging.getLogger("mpreader.dcp").addHandler(alone)
logging.getLogger("mpreader.dcp").setLevel(logging.DEBUG)

def load_state(case, state, expected, make_reader, planner=None):
    alone.lines.clear()
    dist.barrier()
    with record_timeline() as timeline, make_reader() as reader:
        dcp.load(state, storage_reader=reader, planner=planner)
        dist.barrier()
        told = {"case": case, "rank": dist.get_rank(), "requests": len(timeline.events), "lines": alone.lines}
        if hasattr(reader, "host_stats"):
            told |= {"bytes": reader.stats.bytes, "host": reader.host_stats.bytes, "shared": reader.stats.shared_bytes}
            told["verified"] = reader.stats.verified_bytes
    for name, value in expected.items():
        loaded = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        assert torch.equal(loaded, value), (case, name)
    os.write(1, ("told " + json.dumps(told) + "\\n").encode())
    dist.barrier()

def ours(case, **options):
    return lambda: S3StorageReader(None, f"{uri}/{case}", pool_config=POOL, **options)

def save_case(case, state):
    if dist.get_rank() == 0:
        dcp.save(state, storage_writer=S3StorageWriter(None, f"{uri}/{case}"), no_dist=True)
    dist.barrier()
"""

CASES = """
import contextlib, dataclasses, mpreader.telemetry.progress
from s3torchconnector.dcp import S3StorageReader as ConnectorReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from mpreader import S3ReaderConstructor
from mpreader.dcp.load import Load

def shards(expected, placement):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: zeros(*value.shape, device_mesh=mesh, placements=[placement]) for name, value in expected.items()}

def like(expected):
    return {name: torch.zeros_like(value) for name, value in expected.items()}

class FewRows(DefaultLoadPlanner):
    # 100 rows of each tensor, other ones in each rank, and one row that all ranks need.
    def create_local_plan(self):
        plan, first = super().create_local_plan(), 150 * dist.get_rank()
        boxes = [(first, 100), (900, 1)]
        return dataclasses.replace(plan, items=[
            dataclasses.replace(
                item, dest_offsets=at, storage_offsets=at, lengths=torch.Size([count, item.lengths[1]])
            )
            for item in plan.items for start, count in boxes for at in [torch.Size([start, 0])]
        ])

def few_rows(expected):
    first, few = 150 * dist.get_rank(), like(expected)
    for name, value in expected.items():
        for rows in (slice(first, first + 100), slice(900, 901)):
            few[name][rows] = value[rows]
    return few

def check_versions(tensors):
    # Overwritten when each rank has read with the others, before it reads its own rows once more.
    load_again = Load._load_again

    def overwrite_and_load_again(*arguments):
        dist.barrier()
        save_case("overwritten", {name: value + 1 for name, value in tensors.items()})
        load_again(*arguments)

    save_case("overwritten", tensors)
    Load._load_again = overwrite_and_load_again
    try:
        with ours("overwritten")() as reader:
            dcp.load(like(tensors), storage_reader=reader, planner=FewRows())
        raise AssertionError("rows of two versions were loaded")
    except CheckpointException as error:
        failures = {rank: type(failure).__name__ for rank, (failure, _) in error.failures.items()}
        assert failures == dict.fromkeys(range(4), "ObjectChanged"), failures
    finally:
        Load._load_again = load_again

def load_all():
    rank = dist.get_rank()
    as_stored = {f"plain{number}": numbered(1000, 1000, number) for number in range(3)}
    save_case("rows", as_stored)
    load_state("rows", like(as_stored), few_rows(as_stored), ours("rows"), FewRows())
    # What is expected of these records is wrong: each rank reads its own rows once more.
    transposed = {f"transposed{number}": numbered(1000, 1000, number).t() for number in range(3)}
    save_case("transposed", transposed)
    load_state("transposed", like(transposed), few_rows(transposed), ours("transposed"), FewRows())

    check_versions(transposed)

    large = {"large": numbered(4096, 2048), "small": numbered(100, 10)}  # 32 MiB, four times the arena
    save_case("large", large)
    for placement in (Replicate(), Shard(0), Shard(1)):
        load_state(f"large, {placement}", shards(large, placement), large, ours("large"))

    # Each rank needs some tensors that others do not need, and some that all need: some are ahead of others.
    every = {f"{number:02}": numbered(512, 512, number) for number in range(48)}
    save_case("mixed", every)
    mixed = {name: value for name, value in every.items() if int(name) % 8 in (rank, rank + 4) or int(name) > 32}
    mpreader.telemetry.progress._DELAY_S = 0.0  # a load that takes no time shows its bar, too
    load_state("mixed", like(mixed), mixed, ours("mixed", progress=True if rank == 0 else None))
    load_state("alone", like(mixed), mixed, ours("mixed", share_host=False))

    constructor = S3ReaderConstructor.multiprocess(pool_config=POOL)
    reader = ConnectorReader("us-east-1", f"{uri}/mixed", reader_constructor=constructor)
    load_state("drop-in", like(mixed), mixed, lambda: contextlib.nullcontext(reader))
    constructor.close()

    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):  # no launcher tells who is who
        del os.environ[name]
    load_state("no launcher", shards(every, Shard(0)), every, ours("mixed"))

run_job(4, load_all)
"""

JOB = """
def shards(scale):
    mesh, state = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for number, shape in enumerate([(2048, 512), (1021, 777), (7, 5), (3,)]):
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + number
        state[f"{number}"] = distribute_tensor(whole * scale, mesh, [Shard(0)])
    return state

def save_shards():
    dcp.save(shards(1), storage_writer=S3StorageWriter(None, f"{uri}/job"))

def load_shards():
    state, expected = shards(0), {name: value.full_tensor() for name, value in shards(1).items()}
    load_state("job", state, expected, ours("job"))

run_job(int(sys.argv[3]), save_shards)
run_job(int(sys.argv[4]), load_shards)
"""


class Job:
    """What the ranks of a job have told of each of its loads, and how many bytes each load has asked the server for."""

    def __init__(self, stdout: str, stderr: str, server: S3Server, before: int) -> None:
        self.stderr = stderr
        lines = [json.loads(line[5:]) for line in stdout.splitlines() if line.startswith("told ")]
        self._lines = sorted(lines, key=lambda line: int(line["rank"]))
        self._server, self._before = server, before

    @property
    def asked(self) -> int:
        """Bytes that the server was asked for, in all loads."""
        return asked(self._server, self._before)

    def told(self, case: str, name: str) -> list[Any]:
        """What each rank has told of a load."""
        return [line[name] for line in self._lines if line["case"] == case]


@pytest.fixture
def run(bucket: str, s3_server: S3Server, tmp_path: Path, warm_interpreter: WarmInterpreter) -> Any:
    def run(program: str, *arguments: object) -> Job:
        script = tmp_path / "job.py"
        script.write_text(JOBS + HELPERS + program)
        before = len(s3_server.requests)
        done = warm_interpreter.run(script, f"s3://{bucket}", tmp_path, *map(str, arguments), preload=PRELOAD)
        assert done.returncode == 0, done.stderr
        return Job(done.stdout, done.stderr, s3_server, before)

    return run


def check_is_shared(job: Job, case: str, nbytes: int, at_most: float = 1.01) -> None:
    """Check that the first rank has received all that its host needs, and has told the others so."""
    received, *others = job.told(case, "bytes")
    assert nbytes <= received <= at_most * nbytes
    of_leader, *of_others = job.told(case, "host")
    assert of_leader == received
    assert all(0 < one <= received for one in of_others), "what there was when the rank had all that it needs"
    assert others == [0] * len(others)
    assert all(job.told(case, "shared")[1:])
    requests, *of_others = job.told(case, "requests")
    assert requests > 0
    assert of_others == [0] * len(others), "the timeline of the host is the first rank's"
    assert not any(job.told(case, "lines"))


def test_loads_of_the_ranks_of_a_host(run: Any) -> None:
    job: Job = run(CASES)
    row = 4 * 1000
    check_is_shared(job, "rows", 3 * 401 * row, 1.2)
    # The host's read holds the fronts, and nothing else that anybody can use.
    assert all(3 * 101 * row < one - host for one, host in zip(*rank_bytes(job, "transposed"), strict=True))
    for placement in ("R", "S(0)", "S(1)"):
        check_is_shared(job, f"large, {placement}", 4 * 4096 * 2048)
    check_is_shared(job, "mixed", 48 * 4 * 512 * 512)
    bars = [line for line in re.split(r"[\r\n]+", job.stderr) if line.startswith("load:")]
    assert re.match(r"load: +0%", bars[0])
    assert bars[-1].startswith("load: 100%")
    assert [line for line in bars if "100%" in line] == bars[-1:], "one rank shows a bar, and ends it"
    check_is_shared(job, "no launcher", 48 * 4 * 512 * 512)
    for case in ("alone", "drop-in"):
        assert all(job.told(case, "requests"))


def rank_bytes(job: Job, case: str) -> tuple[list[int], list[int]]:
    """Returns what each rank has received, and what of that was for the host."""
    of_host = job.told(case, "host")
    return job.told(case, "bytes"), [of_host[0], *[0] * (len(of_host) - 1)]


@pytest.mark.parametrize(("saving", "loading"), [(3, 4), (8, 6)], ids=["3 to 4", "8 to 6"])
def test_ranks_of_a_host_load_what_another_number_of_ranks_has_saved(run: Any, saving: int, loading: int) -> None:
    job: Job = run(JOB, saving, loading)
    needed = 4 * (2048 * 512 + 1021 * 777 + 7 * 5 + 3)
    check_is_shared(job, "job", needed, 1.02)
    assert job.asked <= 1.02 * needed
