from __future__ import annotations

import os
import threading

from mpreader.pool.coordinator.concurrency import is_host_busy


def test_host_is_busy_while_every_processor_computes() -> None:
    stop = threading.Event()
    pids = []
    for _ in range(len(os.sched_getaffinity(0)) + 1):
        pid = os.fork()
        if not pid:
            while True:
                pass
        pids.append(pid)
    try:
        # The kernel's count is of this moment: all of the children must have been started.
        assert any(is_host_busy() or stop.wait(0.01) for _ in range(500))
    finally:
        for pid in pids:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
