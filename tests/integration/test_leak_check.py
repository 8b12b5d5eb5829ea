"""The leak check of the tests: what a test or its processes leave behind fails it, what other programs do does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Two processes that make and remove shared memory and semaphores all the time, until the input ends.
OTHER_PROGRAM = """
import multiprocessing, os, select
from multiprocessing.shared_memory import SharedMemory

def work(until):
    made, locks = [], []
    while not select.select([until], [], [], 0.001)[0]:
        locks = [*locks[-3:], multiprocessing.get_context("spawn").Lock()]
        made.append(SharedMemory(create=True, size=4096))
        if len(made) > 3:
            oldest = made.pop(0)
            oldest.close()
            oldest.unlink()
        elif len(made) == 3:
            print("under way", flush=True)
    for memory in made:
        memory.close()
        memory.unlink()

child = multiprocessing.get_context("fork").Process(target=work, args=(os.dup(0),))
child.start()
work(0)
child.join()
"""

TESTS = """
import os, subprocess, sys, threading, time
from multiprocessing.shared_memory import SharedMemory

KEPT = {}
OF_A_CHILD = f"/dev/shm/mpreader-{os.getpid()}"
QUIET = "start_new_session=True, stdin=-3, stdout=-3, stderr=-3, env={}"

def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

def test_tidy():
    memory = SharedMemory(create=True, size=100)
    memory.close()
    memory.unlink()
    with open("/dev/null"):
        time.sleep(0.2)  # in which the other program makes names and removes others

def test_tidy_in_time():
    python(f"import subprocess; subprocess.Popen(['sleep', '0.2'], {QUIET})")

def test_untidy():
    KEPT["memory"] = SharedMemory(create=True, size=100)
    KEPT["name"] = SharedMemory(create=True, size=100)
    KEPT["name"].close()
    python(f"open({OF_A_CHILD!r}, 'w').close()")
    KEPT["descriptor"] = os.open("/dev/null", os.O_RDONLY)
    KEPT["running"] = subprocess.Popen(["sleep", "60"])
    KEPT["ended"] = subprocess.Popen(["true"])
    KEPT["orphan"] = int(python(f"import subprocess; print(subprocess.Popen(['sleep', '60'], {QUIET}).pid)"))
    KEPT["event"] = threading.Event()
    threading.Thread(target=KEPT["event"].wait, name="waiting").start()
    print("made", KEPT["memory"].name, KEPT["name"].name, OF_A_CHILD, KEPT["descriptor"], KEPT["running"].pid,
        KEPT["ended"].pid, KEPT["orphan"])

def test_tidy_at_last():
    pass

def teardown_module():
    KEPT["event"].set()
    os.kill(KEPT["orphan"], 9)
    KEPT["running"].kill()
    KEPT["running"].wait()
    KEPT["ended"].wait()
    os.unlink(OF_A_CHILD)
    KEPT["memory"].close()
    KEPT["memory"].unlink()
    KEPT["name"].unlink()
"""


@pytest.fixture
def _other_program() -> Iterator[None]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"under way\n"
        yield
        assert other.poll() is None
        other.stdin.close()


@pytest.mark.usefixtures("_other_program")
def test_leak_check_finds_what_a_test_leaves_and_nothing_of_another_program(tmp_path: Path) -> None:
    file = tmp_path / "test_leaks.py"
    file.write_text(TESTS)
    options = (
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.leak_check",
        "-o",
        "leak_grace_s=1",
        "-rA",
        "-q",
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "4 passed, 1 error in" in run.stdout, run.stdout
    made = re.search(r"^made (\S+) (\S+) /dev/shm/(\S+) (\d+) (\d+) (\d+) (\d+)$", run.stdout, re.MULTILINE)
    left = re.search(r"ERROR at teardown of test_untidy _+\nleft behind: (.*)", run.stdout)
    assert made is not None
    assert left is not None
    memory, name, of_a_child, descriptor, running, ended, orphan = made.groups()
    found = set(left[1].split(", "))
    # SharedMemory keeps a descriptor of its own.
    assert {each for each in found if f"(/dev/shm/{memory})" not in each} == {
        f"shared memory {memory}",
        f"shared memory {name}",
        f"shared memory {of_a_child}",
        f"file descriptor {descriptor} (/dev/null)",
        f"process {running} (sleep)",
        f"process {ended} (true)",
        f"process {orphan} (sleep)",
        "thread waiting",
    }
