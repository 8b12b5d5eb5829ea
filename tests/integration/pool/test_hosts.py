"""Hosts as they are: refused system calls, no /proc, no /dev/shm, a limit of file sizes, no home."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from mpreader.testing import FaultServer
from tests.refusal import refusing, statement_refusing

ROOT: Final = Path(__file__).parents[3]
DATA: Final = bytes(range(256)) * 4096  # 1 MiB

READ: Final = """
import sys
import mpreader

url = sys.argv[1]
pool_config = mpreader.PoolConfig(workers=2, connections_per_worker=2, part_size=128 * 1024)
with mpreader.RangeFetcher(pool_config=pool_config) as fetcher:
    assert bytes(fetcher.fetch(url, [(-5, None)])[0]) == bytes(range(251, 256))
    ranges = [(start, start + 65536) for start in range(0, 1 << 20, 65536)]
    total = sum(len(view) for _, view in fetcher.stream(url, ranges))
    whole = fetcher.fetch_object(url)
    assert bytes(whole) == bytes(range(256)) * 4096
    print(total, fetcher.stats.restarts)
"""


@pytest.fixture
def url() -> Iterator[str]:
    with FaultServer({"/object": DATA}) as server:
        yield server.url("/object")


def run(
    program: str, *arguments: str, prefix: Sequence[str] = (), python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which must come soon and leave no process of its session behind."""
    process = subprocess.Popen(
        [*prefix, python, "-c", textwrap.dedent(program), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def check_reads(done: subprocess.CompletedProcess[str], restarts: int = 0) -> None:
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == f"{1 << 20} {restarts}\n"


# -- system calls that are refused


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "calls",
    [
        ["pidfd_open"],
        ["pidfd_send_signal"],
        ["memfd_create"],
        ["setsid"],
        ["sched_getaffinity"],
        ["statfs", "fstatfs"],
        ["eventfd2", "prctl", "epoll_create1"],
        ["epoll_wait", "epoll_pwait"],
        ["epoll_ctl"],
        ["fallocate"],
        ["pidfd_open", "pidfd_send_signal", "memfd_create", "setsid", "sched_getaffinity", "statfs", "fallocate"],
    ],
    ids=lambda calls: calls[0] if len(calls) < 4 else "all",
)
@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_refused_system_call_is_done_without(url: str, calls: list[str], error: int) -> None:
    check_reads(run(READ, url, prefix=refusing(calls, error)))


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def test_file_system_without_fallocate_is_done_without(url: str, error: int) -> None:
    check_reads(run(READ, url, prefix=refusing(["fallocate"], error)))


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("socketpair", "PoolError: can't start a worker process: "),
        ("sendmsg", "PoolError: can't send to a worker process: "),
        ("recvfrom", "PoolError: can't receive from a worker process: "),
        ("sendto", "WorkerCrashed: worker processes can't start: exit status 1. The last one printed:"),
        ("ftruncate", "ArenaError: can't reserve "),
        ("ioctl", "PoolError: can't start a worker process: "),
        ("pipe2", "PoolError: can't start: "),
    ],
)
@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_refused_system_call_that_is_needed_is_an_error_that_names_it(
    url: str, call: str, problem: str, error: int
) -> None:
    refusal = statement_refusing([call], error)  # after the imports, which may need the call, too
    # No size is asked for before the workers start, and so no connection of this process comes first.
    read = "with mpreader.RangeFetcher() as fetcher: next(fetcher.stream(sys.argv[1], [(0, 5)]))"
    done = run(f"import mpreader.fetch.fetcher, mpreader.pool.pool, boto3\n{refusal}\n{read}", url)
    assert f"mpreader.errors.{problem}" in done.stderr
    assert os.strerror(error) in done.stderr
    assert f"({call}" in done.stderr
    assert "Free some" not in done.stderr


KILLED: Final = """
    import os, signal, sys, time
    import mpreader

    url, signum = sys.argv[1], int(sys.argv[2])
    pool_config = mpreader.PoolConfig(workers=2, connections_per_worker=2, worker_timeout_s=0.5)
    with mpreader.RangeFetcher(pool_config=pool_config) as fetcher:
        fetcher.fetch_object(url)
        pids = fetcher._engine.pool.coordinator.workers.pids
        assert all(worker.process.pidfd == -1 for worker in fetcher._engine.pool.coordinator.workers._workers)
        for pid in pids:
            os.kill(pid, signum)
        assert len(bytes(fetcher.fetch_object(url))) == 1 << 20
        deadline = time.monotonic() + 20
        # Nobody asks an idle worker that is stopped.
        while fetcher.stats.restarts < (2 if signum == signal.SIGKILL else 1):
            assert time.monotonic() < deadline, "the end of a worker was not seen"
            time.sleep(0.01)
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            pass
        else:
            raise AssertionError("a worker was not reaped")
    print("read")
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.row(
    "worker killed, or out of memory", "worker stopped (stuck)", "refused system calls; no /proc, /dev/shm or home"
)
def test_worker_that_dies_where_there_is_no_pidfd_is_replaced(url: str, signum: signal.Signals) -> None:
    done = run(KILLED, url, str(int(signum)), prefix=refusing(["pidfd_open"]))
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.row("parent killed")
def test_worker_without_pidfd_ends_with_its_parent_though_a_fork_keeps_the_socket(url: str) -> None:
    program = """
    import os, signal, sys
    import mpreader
    fetcher = mpreader.RangeFetcher(pool_config=mpreader.PoolConfig(workers=1))
    fetcher.fetch_object(sys.argv[1])
    [pid] = fetcher._engine.pool.coordinator.workers.pids
    socket = os.dup(fetcher._engine.pool.coordinator.workers._workers[0].process.sock.fileno())
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)  # the test waits for the end of the output
        signal.alarm(20)
        signal.pause()
    print(pid, child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run(program, url, prefix=refusing(["pidfd_open"]))
    worker, child = map(int, done.stdout.split())
    try:
        for _ in range(200):
            stat = Path(f"/proc/{worker}/stat")
            if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
                break
            subprocess.run(["sleep", "0.05"], check=True)
        else:
            pytest.fail("the worker goes on")
    finally:
        os.kill(child, 9)


# -- file systems that are not there


def in_mounts(mounts: str) -> list[str]:
    """Return the start of a command that runs the rest of it after mounts of its own."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mounts], capture_output=True).returncode:
        pytest.skip("needs private mounts: run as root, with unshare")
    return [unshare, "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh"]


NO_PROC: Final = "umount -l /proc"
EMPTY_DEV: Final = "d=$(mktemp -d) && mount -t tmpfs none $d && touch $d/null $d/urandom && \
mount --bind /dev/null $d/null && mount --bind /dev/urandom $d/urandom && mount --rbind $d /dev"
READ_ONLY_SHM: Final = "mount -t tmpfs none /dev/shm && mount -o remount,ro /dev/shm"


@pytest.mark.parametrize("mounts", [NO_PROC, EMPTY_DEV, READ_ONLY_SHM], ids=["no /proc", "no /dev/shm", "read-only"])
@pytest.mark.parametrize("max_memory", ["", "64M"])
@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_file_system_that_is_not_there_is_done_without(url: str, mounts: str, max_memory: str) -> None:
    check_reads(run(READ, url, prefix=in_mounts(mounts), MPREADER_MAX_MEMORY=max_memory))


@pytest.mark.parametrize("max_memory", ["", "64M"])
@pytest.mark.parametrize(
    ("mounts", "advice"),
    [
        (EMPTY_DEV, "there is no /dev/shm"),
        (READ_ONLY_SHM, "/dev/shm is read-only"),
        ("mount -t tmpfs -o size=4k none /dev/shm", "--shm-size"),
    ],
    ids=["none", "read-only", "tiny"],
)
@pytest.mark.row("small or full /dev/shm")
def test_host_without_any_shared_memory_is_one_error_before_any_request(
    url: str, mounts: str, advice: str, max_memory: str
) -> None:
    program = "import sys, mpreader\nmpreader.fetch_ranges(sys.argv[1], [(0, 5)])"
    done = run(program, url, prefix=[*in_mounts(mounts), *refusing(["memfd_create"])], MPREADER_MAX_MEMORY=max_memory)
    last = done.stderr.splitlines()[-1]
    if max_memory or "read-only" in advice:
        assert last.startswith("mpreader.errors.ArenaError: can't reserve ")
        assert advice in last
    else:
        assert last.startswith("mpreader.errors.ConfigError: too little memory")
        assert "/dev/shm" in last
        assert "MPREADER_MAX_MEMORY" in last


def test_limit_of_file_sizes_is_one_error_that_names_it(url: str) -> None:
    limited = ["sh", "-c", 'ulimit -f 100 && exec "$@"', "sh"]
    done = run(READ, url, prefix=limited)
    assert done.returncode == 1, "ended by SIGXFSZ"
    assert "mpreader.errors.ArenaError: can't reserve" in done.stderr.splitlines()[-1]
    assert "ulimit -f unlimited" in done.stderr.splitlines()[-1]
    check_reads(run(READ, url, prefix=["sh", "-c", 'ulimit -f 4000 && exec "$@"', "sh"]))


@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_user_without_an_entry_and_without_a_home_reads(url: str) -> None:
    setpriv, python = shutil.which("setpriv"), os.path.realpath(sys.executable)
    nobody = [setpriv or "setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", "env", "-u", "HOME"]
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))])
    if subprocess.run(
        [*nobody, python, "-c", "import numpy"], capture_output=True, env={"PYTHONPATH": paths}
    ).returncode:
        python = "/usr/bin/python3"  # that of the tests may be in somebody's home
    probe = [*nobody, python, "-c", "import numpy, boto3"]
    if setpriv is None or subprocess.run(probe, capture_output=True, env={"PYTHONPATH": paths}).returncode:
        pytest.skip("needs root, setpriv and an interpreter that others may read")
    program = READ + "\nimport mpreader.s3.environment as e\nlist(e._file_versions())\n"
    check_reads(run(program, url, prefix=nobody, python=python, PYTHONPATH=paths, PYTHONDONTWRITEBYTECODE="1"))


# -- every way of reading

EVERY_WAY: Final = """
import sys, warnings
import fsspec, torch
import torch.distributed.checkpoint as dcp
import mpreader
from mpreader.dcp import S3StorageReader, S3StorageWriter, load_checkpoint

warnings.filterwarnings("ignore", message="torch.distributed is disabled")
url, bucket = sys.argv[1:]
uri, settings = f"s3://{bucket}/checkpoint", mpreader.PoolConfig(workers=2, max_memory=32 << 20)
expected = torch.arange(500_000)
dcp.save({"w": expected}, storage_writer=S3StorageWriter("us-east-1", uri), no_dist=True)
constructor = mpreader.S3ReaderConstructor.multiprocess(pool_config=settings)
for options in ({"pool_config": settings}, {"reader_constructor": constructor}):
    state = {"w": torch.zeros_like(expected)}
    dcp.load(state, storage_reader=S3StorageReader("us-east-1", uri, **options), no_dist=True)
    assert torch.equal(state["w"], expected)
constructor.close()
assert torch.equal(load_checkpoint(uri)["w"], expected)
assert fsspec.filesystem("mpreader", pool_config=settings).cat_file(url, 3, 9) == bytes(range(3, 9))
assert bytes(mpreader.fetch_ranges(url, [(-2, None)])[0]) == bytes([254, 255])
print("read")
"""

ALL_CALLS: Final = [
    "pidfd_open",
    "pidfd_send_signal",
    "memfd_create",
    "setsid",
    "sched_getaffinity",
    "statfs",
    "fallocate",
]


@pytest.fixture(params=["refused calls", "no /proc", "no /dev/shm"])
def hostile(request: pytest.FixtureRequest) -> list[str]:
    """Start of a command that runs the rest of it on a host that lacks something."""
    if request.param == "refused calls":
        return refusing([*ALL_CALLS, "eventfd2"], errno.EPERM)
    return in_mounts(NO_PROC if request.param == "no /proc" else EMPTY_DEV)


@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_every_way_of_reading_works_on_a_host_that_lacks_something(url: str, bucket: str, hostile: list[str]) -> None:
    done = run(EVERY_WAY, url, bucket, prefix=hostile)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_commands_work_on_a_host_that_lacks_something(
    url: str, bucket: str, hostile: list[str], tmp_path: Path
) -> None:
    def command(*arguments: str) -> str:
        program = "import sys; from mpreader.cli.main import main; sys.argv[0] = 'mpreader'; main()"
        done = run(program, *arguments, prefix=hostile)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    command("fetch", url, "-o", str(tmp_path / "whole"))
    assert (tmp_path / "whole").read_bytes() == DATA
    findings = {each["name"]: each for each in json.loads(command("doctor", "--json", f"s3://{bucket}"))["findings"]}
    assert findings["pool"]["status"] == findings["shared memory"]["status"] == "ok"


OLD_PYTHON: Final = """
import os, signal
for module, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal"), (os, "memfd_create"), (os, "eventfd")):
    delattr(module, name)  # as in an interpreter that was built for an old kernel, conda's among them
"""


@pytest.mark.row("refused system calls; no /proc, /dev/shm or home")
def test_interpreter_that_was_built_for_an_old_kernel_reads(url: str) -> None:
    check_reads(run(OLD_PYTHON + READ, url))
