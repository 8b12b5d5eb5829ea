"""Jobs whose ranks run on one host: what they receive together, by the server's log; and those that can't share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.dcp.test_sharded_jobs import JOBS, PRELOAD

if TYPE_CHECKING:
    from mpreader.testing import S3Server
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RANKS = 4
NEEDED = 4 * 1024 * 512 * 4  # bytes of the tensors

# The tensors of jobs; the imports are those of JOBS.
NUMBERED = """
POOL = PoolConfig(workers=1, connections_per_worker=4, max_memory=16 * 2**20, part_size=2**20)
NAMES = [f"weight{number}" for number in range(4)]

def expected(number):
    return torch.arange(1024 * 512, dtype=torch.float32).view(1024, 512) + number
"""

CASES = """
import json, logging
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.tensor import Replicate, zeros
from mpreader import S3ReaderConstructor
from mpreader.dcp import sharing

def stored():
    return {name: expected(number) for number, name in enumerate(NAMES)} | {"step": 7}

class Dropping(DefaultLoadPlanner):
    def create_global_plan(self, plans):
        return [dcp.LoadPlan(plan.items) for plan in super().create_global_plan(plans)]

class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        if record.name in ("mpreader.dcp.load", "mpreader.dcp.sharing"):
            self.lines.append(f"{record.levelname}: {record.getMessage()}")

records = Records()
logging.getLogger("mpreader").addHandler(records)
logging.getLogger("mpreader").setLevel(logging.DEBUG)

def load_case(case, placements, shape=(4,), names=NAMES, planner=None, no_dist=False, loads=1, **options):
    rank, path = dist.get_rank(), f"{uri}/{case}"
    if rank == 0:
        dcp.save(stored(), storage_writer=S3StorageWriter(None, path), no_dist=True)
    mesh = init_device_mesh("cpu", shape)
    state = {name: zeros(1024, 512, device_mesh=mesh, placements=placements) for name in names} | {"step": 0}
    if not names:
        state = {}
    dist.barrier()
    records.lines.clear()
    if "reader_constructor" not in options:
        options["pool_config"] = POOL
    with S3StorageReader(None, path, **options) as reader:
        for _ in range(loads):
            dcp.load(state, storage_reader=reader, planner=planner and planner(), no_dist=no_dist)
            stats = reader.stats
    for name in names:
        whole = state[name].full_tensor()
        assert torch.equal(whole, expected(NAMES.index(name))), (case, name)
    told = {
        "case": case, "rank": rank, "bytes": stats.bytes, "shared": stats.shared_bytes,
        "verified": stats.verified_bytes, "unverified": stats.unverified_bytes, "lines": records.lines,
    }
    # By a pipe, whose writes of up to 4 KiB are not mixed.
    os.write(1, ("told " + json.dumps(told) + "\\n").encode())
    dist.barrier()

def load_all():
    rank = dist.get_rank()
    load_case("replica", [Replicate()])
    load_case("rows", [Shard(0)])
    load_case("columns", [Shard(1)])
    load_case("hsdp", [Replicate(), Shard(0)], (2, 2))
    load_case("twice", [Replicate()], loads=2)
    load_case("some", [Replicate()], names=NAMES[: rank])  # the first rank, which leads, needs nothing
    load_case("unverified", [Shard(0)], verify=False)
    load_case("whole", [Shard(0)], verify="whole")
    load_case("alone", [Replicate()], share_host=False)
    load_case("no-dist", [Replicate()], no_dist=True)
    load_case("sequential", [Replicate()], reader_constructor=S3ReaderConstructor.sequential())
    load_case("dropped", [Replicate()], planner=Dropping)
    load_case("other-settings", [Replicate()], s3client_config=S3ClientConfig(max_attempts=3 + rank))
    sharing.host_identity = lambda: f"host {rank % 2}"
    load_case("two-hosts", [Replicate()])
    sharing.host_identity = lambda: f"host {rank}"
    load_case("four-hosts", [Replicate()])

from mpreader import S3ClientConfig
run_job(4, load_all)
"""


class Told:
    """What the ranks have told, and what the server was asked for, by case."""

    def __init__(self, stdout: str, server: S3Server, before: int) -> None:
        self._lines = [json.loads(line[5:]) for line in stdout.splitlines() if line.startswith("told ")]
        self._lines.sort(key=lambda line: line["rank"])
        self._requests = [one for one in server.requests[before:] if one.path.endswith(".distcp")]
        self.cases = {line["case"] for line in self._lines}

    def of(self, case: str, name: str) -> list[Any]:
        """What each rank has told."""
        return [line[name] for line in self._lines if line["case"] == case]

    def asked(self, case: str, method: str = "GET") -> list[tuple[int, int]]:
        """Ranges of the requests for the files of tensors; of a HEAD (0, 0)."""
        chosen = [one for one in self._requests if f"/{case}/" in one.path and one.method == method]
        borders = [re.fullmatch(r"bytes=(\d+)-(\d+)", one.range or "bytes=0-0") for one in chosen]
        return [(int(border[1]), int(border[2])) for border in borders if border]

    def asked_bytes(self, case: str) -> int:
        return sum(end + 1 - start for start, end in self.asked(case))

    def reasons(self, case: str) -> list[str]:
        """Why each rank has read by itself, by its log at level DEBUG; empty if it did not say so."""
        found = [[line for line in lines if "by itself" in line] for lines in self.of(case, "lines")]
        return [re.sub(r"^DEBUG: this rank reads by itself: ", "", lines[0]) if lines else "" for lines in found]


@pytest.fixture
def told(bucket: str, s3_server: S3Server, tmp_path: Path, warm_interpreter: WarmInterpreter) -> Told:
    script = tmp_path / "job.py"
    script.write_text(JOBS + NUMBERED + CASES)
    before = len(s3_server.requests)
    done = warm_interpreter.run(script, f"s3://{bucket}/job", tmp_path, preload=PRELOAD)
    assert done.returncode == 0, done.stderr
    return Told(done.stdout, s3_server, before)


ONCE = ("replica", "rows", "columns", "hsdp", "some", "unverified", "whole")
FOUR_TIMES = ("alone", "no-dist", "dropped", "other-settings", "four-hosts")


def test_ranks_of_a_host_receive_each_byte_once(told: Told) -> None:
    # The job takes seconds, and all cases are of one job, so that one test looks at all of them.
    ratios = {case: told.asked_bytes(case) / NEEDED for case in told.cases}
    assert {case: round(ratios[case], 1) for case in ONCE} == dict.fromkeys(ONCE, 1.0) | {"some": 0.8}
    assert all(ratios[case] <= 1.01 for case in ONCE), ratios
    assert 2.0 < ratios["twice"] <= 2.02
    assert 2.0 < ratios["two-hosts"] <= 2.02
    assert all(4.0 < ratios[case] <= 4.04 for case in FOUR_TIMES), ratios
    assert all(len(told.asked(case, "HEAD")) == 1 for case in ONCE), "one for the object, not for each rank"

    for case in ("replica", "rows", "columns", "hsdp"):
        received, shared = told.of(case, "bytes"), told.of(case, "shared")
        assert received[1:] == [0, 0, 0]
        assert received[0] == told.asked_bytes(case)
        assert shared[0] == 0
        assert all(0 < one <= received[0] for one in shared[1:])
    # Whole tensors are verified by each rank that has them; of those that ranks have slices of, each by one rank.
    assert all(one > NEEDED for one in told.of("replica", "verified"))
    assert NEEDED < sum(told.of("rows", "verified")) < 1.01 * NEEDED + 4 * 100_000
    assert sum(told.of("rows", "unverified")) == 0
    assert sum(told.of("unverified", "verified")) == 0
    assert all(one >= NEEDED // RANKS for one in told.of("unverified", "unverified"))

    for case in ONCE:
        info = [[line for line in lines if line.startswith("INFO")] for lines in told.of(case, "lines")]
        assert [len(lines) for lines in info] == [1, 0, 0, 0], "one line for the host"
        assert "for 4 ranks of this host" in info[0][0]
        assert told.reasons(case) == [""] * RANKS
    lonely = "no other rank of this load is on its host"
    assert told.reasons("four-hosts") == [lonely] * RANKS
    assert told.reasons("no-dist") == [lonely] * RANKS
    assert told.reasons("dropped") == [lonely] * RANKS
    assert told.reasons("other-settings") == [lonely] * RANKS
