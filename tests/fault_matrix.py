"""Fault matrix: the rows of what can go wrong, each with at least one test that proves what then happens.

A pytest plugin that ``tests/conftest.py`` registers. A test names its rows by ``@pytest.mark.row(…)``; a run of all
tests fails if no test of a row has passed.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# What can go wrong. A test says by `@pytest.mark.row(…)` which row it proves; a whole run fails if one has no test.
ROWS = (
    "connection reset in a body",
    "connection closed early (FIN) in a body",
    "wrong Content-Length, Content-Range or total size",
    "200 with the whole object instead of 206",
    "extra bytes after the body",
    "500, 503 SlowDown, a brown-out",
    "server stalls, or trickles",
    "one answer among many: its first byte is late",
    "one answer among many: its rate is far below the others'",
    "one answer among many: it falls silent in its body",
    "a slow server: all answers are slow",
    "a slow server: it pauses as a whole",
    "one of several addresses is slow, or refuses",
    "refused connection, unknown host, TLS failure",
    "expired token or signature in a load",
    "403, 404, wrong region",
    "object overwritten between GETs",
    "ETag missing or different in a 206",
    "weak ETags, or If-Match refused, though nothing was overwritten",
    "Content-Encoding: stored with the object, or made on the way",
    "bit flipped in a tensor's bytes",
    "a box of a tensor: its record is not laid out as predicted",
    "a box of a tensor: the front of its record is damaged",
    "a box of a tensor: overwritten before what was not predicted is read",
    "a box of a tensor: a bit of it is flipped",
    "worker killed, or out of memory",
    "worker stopped (stuck)",
    "worker can't start",
    "parent killed",
    "Ctrl-C",
    "fork of the program after use",
    "small or full /dev/shm",
    "low ulimit -n",
    "refused system calls; no /proc, /dev/shm or home",
    "frozen program; an executable that is no Python",
    "100,000 tiny ranges; one 5 GB item; zero-length range; range past the end",
    "views held while the load goes on; close with live views",
    "no __main__ guard, stdin, daemonic process",
    "exception in the consumer; reader dropped without close",
    "hostile .metadata",
    "damaged or hostile safetensors header or index",
    "secrets",
    "64 workers with instance-role credentials",
    "ranks of a host: one is killed",
    "ranks of a host: one is stopped, never comes, or is slow",
    "ranks of a host: an exception or a Ctrl-C in one",
    "ranks of a host: S3 refuses, an object is overwritten, a record is damaged",
    "ranks of a host: a process that is none of them",
    "ranks of a host: out of shared memory, descriptors or workers",
    "random plans, faults and kills (storm)",
)

# Deadlines hold where nothing else runs. They are there for what hangs, so that a busy machine may take longer.
_PATIENCE = 4


@pytest.fixture(autouse=True)
def _row_ends_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test of the fault matrix ends within its deadline."""
    started = time.monotonic()
    yield
    limits = [marker.kwargs.get("within_s", 30) for marker in request.node.iter_markers("row")]
    if limits:
        assert time.monotonic() - started < _PATIENCE * min(limits), "it ended, but too late"


class _Matrix:
    """Collects what became of the tests of each row."""

    def __init__(self, config: pytest.Config) -> None:
        self._file = config.getoption("--matrix")
        self._is_whole = not (config.option.file_or_dir or config.option.keyword or config.option.markexpr)
        self._found: dict[str, dict[str, list[pytest.TestReport]]] = {row: {} for row in ROWS}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # In the report, which goes from a process of xdist to the one that collects.
        report.__dict__["rows"] = sorted({row for marker in item.iter_markers("row") for row in marker.args})
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for row in getattr(report, "rows", ()):
                self._found[row].setdefault(report.nodeid.partition("[")[0], []).append(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):  # a process of xdist, which has run a part of the tests only
            return
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
