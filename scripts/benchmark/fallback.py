"""Servers without nginx: ``fallback.py ROOT FOLDER`` serves ROOT, with logs of one line a request in FOLDER.

servers.py runs it where nginx is not installed. It prints URL and authority of each server as one line of JSON, and
writes the same logs as nginx would, from which requests are counted.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from servers import BYTES_PER_S, DELAY_S

from mpreader.testing import Fault, FaultKind, FaultServer

_POLL_S = 0.01


def _main(root: Path, folder: Path) -> None:
    # bucket/checkpoint/file, as the paths of nginx.
    files = {f"/{file.relative_to(root)}": file for file in root.glob("*/*/*") if file.is_file()}
    late = [Fault(FaultKind.DELAY, method=method, seconds=DELAY_S) for method in ("GET", "HEAD")]
    servers = {
        "plain": FaultServer(files),
        "tls": FaultServer(files, tls=True),
        "slow90": FaultServer(files, bytes_per_s=BYTES_PER_S),
        "late30": FaultServer(files, late),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # removes the certificate
    with ExitStack() as stack:
        for name, server in servers.items():
            stack.enter_context(server)
            threading.Thread(target=_log, args=(server, folder / f"{name}.log"), daemon=True).start()
        print(json.dumps({name: (server.endpoint_url, str(server.ca_file or "")) for name, server in servers.items()}),
              flush=True)  # fmt: skip
        threading.Event().wait()


def _log(server: FaultServer, file: Path) -> None:
    written = 0
    with file.open("w", buffering=1) as log:
        while True:
            requests = server.requests
            log.writelines(f"{request.method} {request.status}\n" for request in requests[written:])
            written = len(requests)
            time.sleep(_POLL_S)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
