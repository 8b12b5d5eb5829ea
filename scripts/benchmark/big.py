"""Memory during the load of a checkpoint that is larger than what may be held: 20 tensors of 512 MiB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from cells import TITLES
from charts import memory_chart
from measure import Run, measure
from report import plain_text
from servers import Servers
from tasks import Job

__all__ = ["CHECKPOINTS", "run_big"]

CHECKPOINTS: Final = {"big"}
_CONTENDERS: Final = ("mpreader", "drop-in", "dcp_optimized")
_LIMIT_S: Final = 300.0
_POINTS: Final = 12  # the table shows the memory at each twelfth of the load


def run_big(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
    """Load the checkpoint with every contender, print memory over time, write ``big.json`` and ``big.png``."""
    found = {}
    for contender in _CONTENDERS:
        print(f"loading 10.7 GB with {TITLES[contender]} …", flush=True)
        # A checking run, since only those sample memory; of two runs in its process the first is shown.
        job = Job(contender, "big", False, servers.sites["plain"], data, True)
        found[TITLES[contender]] = measure(job, _LIMIT_S)[0]
    head = ["", "seconds", "peak MB", *(f"at {100 * point // _POINTS} %" for point in range(1, _POINTS))]
    print("\nMemory of the process tree besides the target, in MB, over the time of the load")
    print(plain_text([head, *(_line(name, run) for name, run in found.items())], 1))
    title = "Memory while 10.7 GB are loaded (20 bf16 tensors of 512 MiB, http from nginx on this machine)"
    memory_chart({name: run.samples for name, run in found.items()}, title, out / "big.png")
    records = {name: {"seconds": run.seconds, "peak_extra_bytes": run.peak_extra_bytes, "memory_over_time": run.samples}
               for name, run in found.items()}  # fmt: skip
    (out / "big.json").write_text(json.dumps({"machine": machine, "contenders": records}, indent=1) + "\n")
    print(f"\nwritten: {out}/big.json, {out}/big.png")


def _line(name: str, run: Run) -> list[str]:
    # Samples taken after the load, until the sampler was told to end, are left out.
    samples = [extra for at, extra in run.samples if at <= run.seconds]
    points = [samples[len(samples) * point // _POINTS] for point in range(1, _POINTS)]
    peak = run.peak_extra_bytes or 0
    return [name, f"{run.seconds:.1f}", f"{peak / 1e6:.0f}", *(f"{extra / 1e6:.0f}" for extra in points)]
