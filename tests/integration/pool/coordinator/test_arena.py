"""The arena in a host whose ``/dev/shm`` is too small."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mpreader.config import MiB
from tests.refusal import refusing


def in_small_shm(size: str, program: str) -> str:
    """Run a program where ``/dev/shm`` is a private one of ``size``, and is needed: there is no memfd_create."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount (root) for a /dev/shm of its own")
    shell = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$0" -c "$1"'
    result = subprocess.run(
        ["unshare", "-m", *refusing(["memfd_create"]), "sh", "-c", shell, sys.executable, textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[4],
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.row("small or full /dev/shm")
def test_arena_on_a_full_dev_shm_says_what_to_do() -> None:
    out = in_small_shm(
        "2m",
        """
        from mpreader.errors import ArenaError
        from mpreader.pool.coordinator.arena import Arena
        try:
            Arena(64 << 20, 1 << 20, 32 << 20).allocate(1000)
        except ArenaError as error:
            print(error)
        """,
    )
    assert "No space left" in out
    assert "2097152 bytes free" in out
    assert "--shm-size" in out
    assert "MPREADER_MAX_MEMORY" in out


@pytest.mark.row("small or full /dev/shm")
def test_arena_that_meets_a_full_dev_shm_goes_on_smaller_with_a_warning() -> None:
    out = in_small_shm(
        "5m",
        """
        import logging
        logging.basicConfig()
        from mpreader.pool.coordinator.arena import Arena
        arena = Arena(64 << 20, 1 << 20, 2 << 20)
        slots = []
        while (slot := arena.allocate(1 << 20)) is not None:
            slot.segment.map[slot.offset : slot.offset + (1 << 20)] = b"x" * (1 << 20)
            slots.append(slot)
        print(len(slots), arena.max_bytes)
        arena.free(slots.pop())
        assert arena.allocate(1 << 20) is not None
        """,
    )
    assert f"4 {4 * MiB}" in out
    assert "WARNING:mpreader.pool.coordinator.arena:shared memory is short" in out


@pytest.mark.row("small or full /dev/shm")
def test_pool_fits_itself_to_a_small_dev_shm() -> None:
    out = in_small_shm(
        "4m",
        """
        import os
        from mpreader import RangeFetcher
        from mpreader.testing import FaultServer
        data = os.urandom(3_000_000)
        with FaultServer({"/o": data}) as server, RangeFetcher() as fetcher:
            ranges = [(start, start + 100_000) for start in range(0, 3_000_000, 100_000)]
            for index, view in fetcher.stream(server.url("/o"), ranges):
                assert view == data[index * 100_000 :][:100_000]
            print("all", fetcher._engine.pool.sizes.max_bytes)
        """,
    )
    assert "all" in out
