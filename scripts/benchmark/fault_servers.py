"""Fault servers of the benchmark: ``fault_servers.py WHICH ROOT FOLDER`` serves ROOT, with logs in FOLDER.

servers.py runs it: ``usual`` takes the place of nginx where that is not installed, ``tail`` serves ``scripts/bench
tail``. It prints URL and authority of each server as one line of JSON, and logs one line for each request, as nginx
does.
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

from mpreader.testing import Fault, FaultKind, FaultServer, scattered_faults

_POLL_S = 0.01
_LATE_S = 5.0
_FOR_EVER_S = 3600.0
_SEED = 14
_MOST_REQUESTS = 50_000  # of all measurements together


def _usual(files: dict[str, Path]) -> dict[str, FaultServer]:
    late = [Fault(FaultKind.DELAY, method=method, seconds=DELAY_S) for method in ("GET", "HEAD")]
    return {
        "plain": FaultServer(files),
        "tls": FaultServer(files, tls=True),
        "slow90": FaultServer(files, bytes_per_s=BYTES_PER_S),
        "late30": FaultServer(files, late),
        "far": FaultServer(files, late, bytes_per_s=BYTES_PER_S),
    }


def _tail(files: dict[str, Path]) -> dict[str, FaultServer]:
    faults = {
        "steady": (),
        "some-late": _one_in_hundred(Fault(FaultKind.DELAY, seconds=_LATE_S)),
        "some-silent": _one_in_hundred(Fault(FaultKind.STALL, seconds=_FOR_EVER_S)),
    }
    # The checkpoint of these rows only: each server computes the ETags of all its files.
    files = {path: file for path, file in files.items() if file.parent.name == "a"}
    return {name: FaultServer(files, schedule, bytes_per_s=BYTES_PER_S) for name, schedule in faults.items()}


def _one_in_hundred(fault: Fault) -> tuple[Fault, ...]:
    # Exactly one, so that no load of some hundred requests is without.
    return scattered_faults(fault, seed=_SEED, every=100, requests=_MOST_REQUESTS)


def _main(which: str, root: Path, folder: Path) -> None:
    # bucket/checkpoint/file, as the paths of nginx.
    files = {f"/{file.relative_to(root)}": file for file in root.glob("*/*/*") if file.is_file()}
    servers = {"usual": _usual, "tail": _tail}[which](files)
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
    _main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
