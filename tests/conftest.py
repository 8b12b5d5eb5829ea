"""What every test gets: an embedded S3 on request, and the proof that it left nothing behind; the fault matrix."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing.resource_tracker
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from mpreader.testing import S3Server

_GRACE_S = 3.0

# What can go wrong. A test says by `@pytest.mark.row(…)` which row it proves; a whole run fails if one has no test.
ROWS = (
    "connection reset in a body",
    "connection closed early (FIN) in a body",
    "wrong Content-Length, Content-Range or total size",
    "200 with the whole object instead of 206",
    "extra bytes after the body",
    "500, 503 SlowDown, a brown-out",
    "server stalls, or trickles",
    "refused connection, unknown host, TLS failure",
    "expired token or signature in a load",
    "403, 404, wrong region",
    "object overwritten between GETs",
    "ETag missing or different in a 206",
    "bit flipped in a tensor's bytes",
    "worker killed, or out of memory",
    "worker stopped (stuck)",
    "worker can't start",
    "parent killed",
    "Ctrl-C",
    "fork of the program after use",
    "small or full /dev/shm",
    "low ulimit -n",
    "100,000 tiny ranges; one 5 GB item; zero-length range; range past the end",
    "views held while the load goes on; close with live views",
    "no __main__ guard, stdin, daemonic process",
    "exception in the consumer; reader dropped without close",
    "hostile .metadata",
    "secrets",
    "64 workers with instance-role credentials",
    "random plans, faults and kills (storm)",
)


@pytest.fixture(scope="session", autouse=True)
def _process_wide_singletons() -> None:
    """Open what a process opens once and keeps, before any test counts file descriptors."""
    multiprocessing.resource_tracker.ensure_running()
    if importlib.util.find_spec("torch") is not None:
        import torch
        import torch.distributed.checkpoint

        torch.zeros(1).add_(1)
    if importlib.util.find_spec("s3torchconnectorclient") is not None:
        # Its native library opens the source of random numbers when a client is made, and never closes it.
        from s3torchconnectorclient._mountpoint_s3_client import MountpointS3Client

        MountpointS3Client(region="us-east-1", unsigned=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(_process_wide_singletons: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """After every test: no child process, shared memory, file descriptor or non-daemon thread more than before."""
    before = _held()
    yield
    caplog.get_records("call").clear()  # torch logs exceptions, whose tracebacks keep clients and their sockets alive
    pool = sys.modules.get("mpreader.pool.pool")
    if pool is not None:
        pool.close_shared_pools()
    deadline = time.monotonic() + _GRACE_S
    left = _held() - before
    while left and time.monotonic() < deadline:
        gc.collect()  # a client dropped in a reference cycle keeps its sockets until then
        threading.Event().wait(0.02)
        left = _held() - before
    assert not left, "left behind: " + ", ".join(sorted(left))


@pytest.fixture(autouse=True)
def _row_ends_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of the fault matrix ends within its deadline."""
    started = time.monotonic()
    yield
    limits = [marker.kwargs.get("within_s", 30) for marker in request.node.iter_markers("row")]
    if limits:
        assert time.monotonic() - started < min(limits), "it ended, but too late"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One embedded S3 for the whole run."""
    with S3Server() as server:
        yield server


@pytest.fixture
def aws_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point boto3, and all that is built on it, to the embedded S3, whatever the developer's own settings are."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(s3_server: S3Server, aws_environment: None) -> str:
    """Name of a new, empty bucket of the embedded S3."""
    name = f"bucket-{secrets.token_hex(6)}"
    s3_server.create_bucket(name)
    return name


def _held() -> set[str]:
    """Everything that must not outlive a test, in words."""
    held = {f"thread {thread.name}" for thread in threading.enumerate() if not thread.daemon}
    held.update(f"shared memory {entry.name}" for entry in Path("/dev/shm").iterdir())
    held.update(f"process {pid} ({command})" for pid, command in _children())
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that listdir itself had open
        held.add(f"file descriptor {entry} ({target})")
    return held


def _children() -> Iterator[tuple[int, str]]:
    tracker = multiprocessing.resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = re.fullmatch(r"(\d+) \((.*)\) \S (\d+) .*", stat.read_text(), re.DOTALL)
        except OSError:
            continue  # ended meanwhile
        if fields and int(fields[3]) == os.getpid() and int(fields[1]) != tracker:
            yield int(fields[1]), fields[2]


# -- the fault matrix


class _Matrix:
    """Collects what became of the tests of each row."""

    def __init__(self, config: pytest.Config) -> None:
        self._file = config.getoption("--matrix")
        self._is_whole = not (config.option.file_or_dir or config.option.keyword or config.option.markexpr)
        self._found: dict[str, dict[str, list[pytest.TestReport]]] = {row: {} for row in ROWS}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            for row in {row for marker in item.iter_markers("row") for row in marker.args}:
                self._found[row].setdefault(item.nodeid.partition("[")[0], []).append(report)
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._file:
            Path(self._file).write_text("\n".join(self._lines()) + "\n")
        if self._is_whole and self._missing() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        tests = sum(map(len, self._found.values()))
        if self._is_whole and tests:
            terminalreporter.write_line(f"fault matrix: {len(ROWS)} rows, {tests} tests; --matrix=FILE writes it")
            for row in self._missing():
                terminalreporter.write_line(f"fault matrix: no test passed for {row!r}", red=True)

    def _missing(self) -> list[str]:
        outcomes = {
            row: {report.outcome for reports in tests.values() for report in reports}
            for row, tests in self._found.items()
        }
        return [row for row, seen in outcomes.items() if not seen & {"passed", "skipped"}]

    def _lines(self) -> Iterator[str]:
        yield from ("| what goes wrong | test | outcome | seconds |", "| --- | --- | --- | ---: |")
        for row, tests in self._found.items():
            for test, reports in tests.items():
                outcomes = {report.outcome for report in reports}
                outcome = ", ".join(sorted(outcomes)) + (f" ({len(reports)} cases)" if len(reports) > 1 else "")
                file, _, name = test.rpartition("::")
                seconds = sum(report.duration for report in reports)
                yield f"| {row} | `{name}` ({file.removeprefix('tests/')}) | {outcome} | {seconds:.1f} |"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write what became of the fault matrix, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Matrix(config))
