"""Interpreters of workers: found whatever ``sys.executable`` is, and proved before a second worker is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from mpreader.testing import FaultServer

ROOT: Final = Path(__file__).parents[3]
DATA: Final = bytes(range(256)) * 4096  # 1 MiB

FETCH: Final = """
def fetch(url):
    from mpreader import PoolConfig, RangeFetcher
    with RangeFetcher(pool_config=PoolConfig(workers=3, connections_per_worker=1, part_size=65536)) as fetcher:
        assert bytes(fetcher.fetch_object(url)) == bytes(range(256)) * 4096
    print("read")
"""


@pytest.fixture
def url() -> Iterator[str]:
    with FaultServer({"/object": DATA}) as server:
        yield server.url("/object")


class Program:
    """A program in a file, which notes each of its starts, and a starter of it, as a frozen program's executable is."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._starts = folder / "starts"
        self.starter = self.script(
            "program", f'PYTHONPATH={ROOT} URL={url} exec {sys.executable} {folder}/program.py "$@"\n'
        )

    def script(self, name: str, text: str) -> Path:
        path = self._folder / name
        path.write_text("#!/bin/sh\n" + text)
        path.chmod(0o755)
        return path

    def run(self, text: str, command: list[str] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the program; ``STARTER`` and ``URL`` are names in it."""
        note = f"import os, sys\nURL, STARTER = {self._url!r}, {str(self.starter)!r}\n"
        # Whatever goes wrong, it ends: the tenth start fails, and so do all after it.
        note += f"with open({str(self._starts)!r}, 'a') as log:\n    log.write('start\\n')\n"
        note += f"if len(open({str(self._starts)!r}).readlines()) > 9:\n    sys.exit('a fork bomb')\n"
        path = self._folder / "program.py"
        path.write_text(note + FETCH + textwrap.dedent(text))
        return subprocess.run(
            [*(command or [sys.executable]), str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )

    @property
    def starts(self) -> int:
        return len(self._starts.read_text().splitlines())


@pytest.fixture
def program(tmp_path: Path, url: str) -> Program:
    return Program(tmp_path, url)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The program's one error, in full."""
    assert done.returncode == 1, done.stderr
    return done.stderr[done.stderr.rindex("\nmpreader.errors.") + 1 :]


FROZEN: Final = """
import multiprocessing.spawn
sys.frozen, sys.executable = True, STARTER  # as the packer's start-up code does
multiprocessing.spawn.set_executable(STARTER)
"""


@pytest.mark.row("frozen program; an executable that is no Python")
def test_frozen_program_reads_if_it_calls_freeze_support(program: Program) -> None:
    done = program.run(FROZEN + "multiprocessing.spawn.freeze_support()\nfetch(URL)\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
    assert program.starts == 4, "itself and three workers"


@pytest.mark.row("frozen program; an executable that is no Python")
def test_frozen_program_that_does_not_call_freeze_support_is_one_error(program: Program) -> None:
    done = program.run(FROZEN + "fetch(URL)\n")
    error = error_of(done)
    assert error.startswith("mpreader.errors.WorkerCrashed: worker processes can't start; tried ")
    assert "freeze_support() as the first line" in error
    assert program.starts == 2


@pytest.mark.row("frozen program; an executable that is no Python")
def test_frozen_program_that_goes_on_for_ever_in_place_of_a_worker_is_ended(program: Program) -> None:
    forever = """
    if "--multiprocessing-fork" in sys.argv:
        import time
        print("at work")
        time.sleep(3600)
    import mpreader.pool.coordinator.workers as workers
    workers._LEAST_START_TIMEOUT_S = 1.0
    fetch(URL)
    """
    error = error_of(program.run(FROZEN + textwrap.dedent(forever)))
    assert "it was silent for 1 s and was killed" in error
    assert program.starts <= 2  # on a busy machine the second start is ended before it is noted


def test_frozen_program_whose_first_thread_of_many_starts_workers_starts_one(program: Program) -> None:
    threads = """
    import threading
    from mpreader import fetch_ranges
    errors = []
    def read():
        try:
            fetch_ranges(URL, [(0, 5)])
        except Exception as error:
            errors.append(error)
    several = [threading.Thread(target=read) for _ in range(4)]
    for thread in several: thread.start()
    for thread in several: thread.join()
    raise errors[0]
    """
    assert "freeze_support" in error_of(program.run(FROZEN + textwrap.dedent(threads)))
    assert program.starts == 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "executable", ["None", "''", "'/no/such/python'", "'/bin/false'", "STARTER", "'python3'", "'/'", "URL"]
)
@pytest.mark.row("frozen program; an executable that is no Python")
def test_program_reads_whatever_sys_executable_is(program: Program, executable: str, when: str) -> None:
    change = f"sys.executable = {executable}\n"
    done = program.run(
        change + "fetch(URL)\n" if when == "before" else "import mpreader.pool.pool\n" + change + "fetch(URL)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
    assert program.starts == 1


@pytest.mark.row("frozen program; an executable that is no Python")
def test_program_reads_with_an_executable_of_a_server(program: Program, tmp_path: Path) -> None:
    server = tmp_path / "server"  # which has Python built in, as uWSGI has: it runs programs, and knows no option
    shutil.copy(os.path.realpath(sys.executable), server)
    done = program.run(
        f"assert os.readlink('/proc/self/exe') == {str(server)!r}\nsys.executable = {str(server)!r}\n"
        "import mpreader.pool.coordinator.interpreter as i\nassert not i.InterpreterChoice().is_proved\nfetch(URL)\n",
        command=[str(server)],
        PYTHONHOME=sysconfig.get_config_var("prefix"),
        PYTHONPATH=os.pathsep.join([str(ROOT), *(path for path in sys.path if path.endswith("-packages"))]),
    )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


CHOSEN: Final = "import multiprocessing.spawn\nmultiprocessing.spawn.set_executable({path!r})\nfetch(URL)\n"


def test_interpreter_that_was_chosen_may_be_a_script_that_becomes_it(program: Program) -> None:
    path = program.script("anything", f'exec {sys.executable} "$@"\n')
    done = program.run(CHOSEN.format(path=str(path)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (f'{sys.executable} "$@"\n', "must do so by exec"),
        ("exit 0\n", "exit status 0"),
        ("echo 'unknown option -s' >&2; exit 2\n", "exit status 2: unknown option -s"),
        ('exec env -i "$STARTER"\n', "exit status"),
    ],
    ids=["a child", "ignores all", "fails", "another program"],
)
@pytest.mark.row("frozen program; an executable that is no Python")
def test_interpreter_that_was_chosen_and_is_none_is_started_once(
    program: Program, tmp_path: Path, script: str, problem: str
) -> None:
    path = program.script("python3", f"echo start >> {tmp_path}/attempts\n{script}")
    error = error_of(program.run(CHOSEN.format(path=str(path))))
    assert error.startswith(f"mpreader.errors.WorkerCrashed: worker processes can't start; tried '{path}': ")
    assert problem in error
    assert "multiprocessing.set_executable('/path/to/python3." in error
    assert (tmp_path / "attempts").read_text() == "start\n"


def test_process_that_was_to_be_a_worker_starts_none(program: Program) -> None:
    done = program.run("fetch(URL)\n", MPREADER_WORKER_OF="1")
    assert "PoolError: this program was started by process 1 to be a worker of mpreader" in error_of(done)


PYINSTALLER: Final = """
import multiprocessing, sys
from mpreader import fetch_ranges
if __name__ == "__main__":
    multiprocessing.freeze_support()
    print(bytes(fetch_ranges(sys.argv[1], [(0, 3)])[0]))
"""


@pytest.mark.timeout(600)
def test_program_of_pyinstaller_reads(tmp_path: Path, url: str) -> None:
    pyinstaller = shutil.which("pyinstaller")
    if pyinstaller is None:
        pytest.skip("needs PyInstaller, which the tests do not install")
    path = tmp_path / "program.py"
    path.write_text(PYINSTALLER)
    options = ["--log-level=ERROR", "--paths", str(ROOT), "--collect-submodules=mpreader", "--exclude-module=torch"]
    folders = [f"--{name}={tmp_path}/{name}" for name in ("distpath", "workpath", "specpath")]
    subprocess.run([pyinstaller, "--onedir", *options, *folders, str(path)], check=True)
    done = subprocess.run(
        [tmp_path / "distpath/program/program", url], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "b'\\x00\\x01\\x02'\n"), done.stderr
