"""Scaling of a fetch with workers and connections, from a server that gives each connection 90 MB/s, as S3 does."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any, Final

from checkpoints import BUCKET, Checkpoint
from measure import Run, measure
from report import plain_text
from servers import Servers
from tasks import Job

__all__ = ["CHECKPOINTS", "run_scaling"]

CHECKPOINTS: Final = {"a"}
WORKERS: Final = (1, 2, 4, 8)
CONNECTIONS: Final = (1, 2, 4, 8, 16)
_ROUNDS: Final = 3


def run_scaling(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
    """Measure every combination, print the table, write ``scaling.json``."""
    nbytes = sum(Checkpoint(data / BUCKET / "a").files.values())
    runs: dict[tuple[int, int], list[Run]] = {}
    for number in range(1, _ROUNDS + 1):
        print(f"round {number} of {_ROUNDS}: {len(WORKERS) * len(CONNECTIONS)} measurements, about 2 min", flush=True)
        for workers in WORKERS:
            for connections in CONNECTIONS:
                job = Job("mpreader", "f", False, servers.sites["slow90"], data, False, workers, connections)
                # Of the two runs in a process the second one: with workers started and connections open.
                runs.setdefault((workers, connections), []).append(measure(job)[1])
    speeds = {pair: nbytes / 1e9 / median(run.seconds for run in found) for pair, found in runs.items()}
    cpu = {pair: median(run.cpu_s for run in found) / nbytes * 1e9 for pair, found in runs.items()}
    print(
        f"\nGB/s of a fetch of {nbytes / 1e9:.1f} GB, streamed, 90 MB/s per connection, warm pool, median of {_ROUNDS}"
    )
    print(plain_text(_table(speeds), 1))
    print("\nCPU seconds per GB, server not counted")
    print(plain_text(_table(cpu), 1))
    records = [
        {"workers": workers, "connections_per_worker": connections, "gb_per_s": speeds[workers, connections],
         "cpu_s_per_gb": cpu[workers, connections], "seconds": [run.seconds for run in found]}
        for (workers, connections), found in runs.items()
    ]  # fmt: skip
    (out / "scaling.json").write_text(json.dumps({"machine": machine, "rows": records}, indent=1) + "\n")
    print(f"\nwritten: {out}/scaling.json")


def _table(values: dict[tuple[int, int], float]) -> list[list[str]]:
    head = ["workers", *(f"{connections} conn." for connections in CONNECTIONS)]
    return [
        head,
        *([str(workers), *(f"{values[workers, number]:.2f}" for number in CONNECTIONS)] for workers in WORKERS),
    ]
