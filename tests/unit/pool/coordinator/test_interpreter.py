"""Interpreter choice: which executables are tried, in which order, and what proves one. No process is started."""

from __future__ import annotations

import contextlib
import multiprocessing.spawn
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpreader.errors import PoolError, WorkerCrashed
from mpreader.pool.coordinator import interpreter
from mpreader.pool.coordinator.interpreter import Interpreter, InterpreterChoice, require_no_worker
from mpreader.pool.worker.messages import Ready, python_name


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = multiprocessing.spawn.get_executable()
    monkeypatch.setattr(interpreter, "_proved", set())
    monkeypatch.setattr(interpreter, "_refused_programs", {})
    yield
    multiprocessing.spawn.set_executable(before)


def tried() -> list[Interpreter]:
    choice = InterpreterChoice()
    found = [choice.current]
    with contextlib.suppress(WorkerCrashed):
        while True:
            choice.refuse("no", 1)
            found.append(choice.current)
    return found


def test_interpreter_that_runs_this_process_is_certain() -> None:
    choice = InterpreterChoice()
    assert choice.current == Interpreter(sys.executable, is_certain=True)
    assert choice.is_proved


def test_interpreter_is_proved_by_the_first_message_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_runs_this_process", lambda _: False)  # no /proc
    choice = InterpreterChoice()
    assert not choice.is_proved
    assert choice.fault_of(Ready(7, python_name()), 8) is not None
    fault = choice.fault_of(Ready(7, "cpython 3.1"), 7)
    assert fault == f"it is cpython 3.1, and not {python_name()}"
    assert not choice.is_proved
    assert choice.fault_of(Ready(7, python_name()), 7) is None
    assert InterpreterChoice().is_proved, "once is enough for a process"


def test_one_executable_at_most_that_is_not_named_as_an_interpreter_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = tmp_path / "server"
    server.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    multiprocessing.spawn.set_executable(str(server))
    monkeypatch.setattr(sys, "_base_executable", "/bin/cat")
    found = tried()
    assert found[-1] == Interpreter(str(server)), "it is the last"
    assert [each for each in found if "python" not in os.path.basename(each.path)] == [found[-1]]
    assert len({each.path for each in found}) == len(found)


def test_interpreter_that_was_chosen_is_the_only_one() -> None:
    multiprocessing.spawn.set_executable("/opt/other/python3")
    assert tried() == [Interpreter("/opt/other/python3")]


def test_frozen_program_is_the_only_one_and_takes_the_arguments_of_multiprocessing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.touch(mode=0o755)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(program))
    assert tried() == [Interpreter(str(program), is_program=True)]
    monkeypatch.setattr(sys, "executable", None)
    assert tried() == [Interpreter("/proc/self/exe", is_program=True)]


def test_compiled_program_is_tried_after_real_interpreters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__compiled__", object(), raising=False)
    found = tried()
    assert found[0].path == sys.executable
    assert found[-1] == Interpreter("/proc/self/exe", is_program=True)


def test_host_without_any_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_is_executable", lambda _: False)
    assert [each.path for each in tried()] == ["python3"]


def test_process_with_the_mark_of_a_worker_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    require_no_worker()
    monkeypatch.setenv("MPREADER_WORKER_OF", "5")
    with pytest.raises(PoolError, match=r"process 5 to be a worker.*freeze_support"):
        require_no_worker()
