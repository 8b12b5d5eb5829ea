"""Programs that gevent has patched, as a whole or in part, before or after the import: they read, and nothing hangs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from mpreader import S3Client
from mpreader.testing import FaultServer

if importlib.util.find_spec("gevent") is None:
    pytest.skip("needs gevent", allow_module_level=True)

ROOT: Final = Path(__file__).parents[3]
DATA: Final = bytes(range(256)) * 1024

READ: Final = """
import sys
how, when, *urls = sys.argv[1:]
if when == "after":
    import mpreader, mpreader.fetch.fetcher
from gevent import monkey
exec(how)
import faulthandler
faulthandler.dump_traceback_later(30, exit=True)
import os, signal, threading, time
import mpreader

whole = bytes(range(256)) * 1024
for url in urls:
    with mpreader.RangeFetcher(pool_config=mpreader.PoolConfig(workers=2, part_size=65536)) as fetcher:
        assert bytes(fetcher.fetch(url, [(-7, None)], timeout_s=20)[0]) == whole[-7:]
        got = {index: bytes(view) for index, view in fetcher.stream(url, [(0, 5), (9, 99_999)], timeout_s=20)}
        assert got == {0: whole[:5], 1: whole[9:99_999]}
        failed = []
        def read():
            if bytes(fetcher.fetch_object(url, timeout_s=20)) != whole:
                failed.append(url)
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not failed
        pids = fetcher._engine.pool.coordinator.workers.pids
        os.kill(pids[0], signal.SIGKILL)
        assert bytes(fetcher.fetch_object(url, timeout_s=20)) == whole
    for pid in pids:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        raise AssertionError("a worker was left")
print("read")
"""

WAYS: Final = [
    "monkey.patch_all()",
    "monkey.patch_all(thread=False)",
    "monkey.patch_all(thread=False, select=False)",
    "monkey.patch_all(queue=False)",
    "monkey.patch_all(select=False)",
    "monkey.patch_all(subprocess=False)",
    "monkey.patch_thread()",
    "monkey.patch_socket()",
    "monkey.patch_queue()",
    "monkey.patch_subprocess()",
]


@pytest.mark.parametrize("how", WAYS)
def test_program_that_gevent_has_patched_reads(bucket: str, how: str) -> None:
    client = S3Client()
    with client.put_object(bucket, "o") as writer:
        writer.write(DATA)
    client.close()
    when = "after" if how == WAYS[1] else "before"
    with FaultServer({"/object": DATA}) as server:
        urls = [f"s3://{bucket}/o", *([server.url("/object")] if how in WAYS[:3] else [])]
        done = subprocess.run(
            [sys.executable, "-c", READ, how, when, *urls],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr


OFFER: Final = """
import sys
from gevent import monkey
exec(sys.argv[1])
import logging
logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
logging.getLogger().setLevel(logging.WARNING)
logging.getLogger("mpreader").setLevel(logging.DEBUG)
import mpreader
from mpreader.dcp.sharing import try_offer
offered = try_offer(mpreader.MultiprocessConstructor())
assert (offered is None) == (sys.argv[1] != ""), offered
"""


@pytest.mark.parametrize("how", ["", "monkey.patch_socket()", "monkey.patch_all(thread=False)"])
def test_rank_whose_sockets_are_patched_does_not_share_its_host(how: str) -> None:
    program = subprocess.run(
        [sys.executable, "-c", OFFER, how], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert program.returncode == 0, program.stderr
    assert ("reads by itself: gevent" in program.stdout) == bool(how)
