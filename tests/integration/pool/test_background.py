from __future__ import annotations

import subprocess
import sys


def test_background_call_that_hangs_does_not_keep_the_interpreter_from_exiting() -> None:
    code = """
import threading
from mpreader.pool.background import BackgroundThreads

begun = threading.Event()
BackgroundThreads("hangs").submit(lambda: (begun.set(), threading.Event().wait()), print)
begun.wait()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
