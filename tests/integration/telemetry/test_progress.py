"""The progress bar on a terminal, as the terminal shows it; and where there must be none."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pyte
import pytest

from mpreader.testing import FaultServer

ROWS, COLUMNS = 24, 100
DATA = bytes(range(256)) * 8_000
SECONDS = 1.2  # more than the half second after which a bar appears
BAR = re.compile(
    r"fetch: +(?P<percent>\d+)%\|.+\| [\d.]+[kM]?/2\.05M \[\d\d:\d\d<(\d\d:\d\d|\?), +([\d.]+[kM]?|\?)B/s\]"
)
FETCH = [sys.executable, "-W", "error", "-m", "mpreader", "fetch", "-o", "copy", "--part-size", "64KiB"]
LIBRARY = """
import sys
from mpreader import PoolConfig, RangeFetcher
config = PoolConfig(workers=1, connections_per_worker=1, part_size=64 << 10)
with RangeFetcher(pool_config=config, progress=None) as fetcher:
    fetcher.fetch_object(sys.argv[1], out=bytearray(2_048_000))
"""


@pytest.fixture
def url() -> Iterator[str]:
    with FaultServer({"/data": DATA}, bytes_per_s=len(DATA) / SECONDS) as server:
        yield server.url("/data")


class Terminal:
    """A terminal that a program runs in, with the contents of its screen."""

    def __init__(self, command: list[str], folder: Path, **settings: str) -> None:
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {**os.environ, "TERM": "xterm", **settings}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)

    def screens(self) -> Iterator[list[str]]:
        """The lines of the screen after each piece of output, until the program ends."""
        while data := self._read():
            self._stream.feed(data)
            yield [line.rstrip() for line in self._screen.display if line.strip()]
        os.close(self._master)
        assert self.process.wait(timeout=30) == 0

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 1 << 16)
        except OSError as error:
            if error.errno != errno.EIO:  # Linux's end of a terminal
                raise
            return b""


def one_connection(url: str) -> list[str]:
    return [*FETCH, url, "--workers", "1", "--connections", "1"]


def test_bar_on_a_terminal_shows_percentage_bytes_rate_and_time_left(url: str, tmp_path: Path) -> None:
    screens = list(Terminal(one_connection(url), tmp_path).screens())
    bars = [bar for lines in screens for line in lines if (bar := BAR.fullmatch(line))]
    percents = [int(bar["percent"]) for bar in bars]
    assert any(0 < percent < 100 for percent in percents), screens
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert any(bar[2] != "?" and bar[3] != "?" for bar in bars)
    # One line that is drawn again and again, and stays; below it what fetch has to say.
    assert BAR.fullmatch(screens[-1][0])
    assert screens[-1][1].startswith("copy: 2.05 MB in ")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_bar_of_the_library_is_the_same(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", LIBRARY, url]
    screens = list(Terminal(command, tmp_path).screens())
    assert any(0 < int(bar["percent"]) < 100 for lines in screens for line in lines if (bar := BAR.fullmatch(line)))
    assert BAR.fullmatch(screens[-1][0])
    assert len(screens[-1]) == 1


def test_no_bar_where_it_is_off_or_another_rank_or_no_terminal(url: str, tmp_path: Path) -> None:
    command = one_connection(url)
    silent = [
        ([*command, "--no-progress"], {}),
        (command, {"MPREADER_PROGRESS": "0"}),
        (command, {"RANK": "1"}),
    ]
    terminals = []
    for number, (arguments, settings) in enumerate(silent):
        (tmp_path / str(number)).mkdir()
        terminals.append(Terminal(arguments, tmp_path / str(number), **settings))
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    for terminal in terminals:
        screens = list(terminal.screens())
        assert screens[-1][0].startswith("copy: 2.05 MB in ")
        assert not any("%" in line for lines in screens for line in lines)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert piped.stdout.startswith("copy: 2.05 MB in ")


def test_bar_goes_through_a_pipe_where_that_is_asked_for(url: str, tmp_path: Path) -> None:
    command = [*one_connection(url), "--progress"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr.count("%|") > 1
