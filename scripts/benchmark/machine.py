"""Facts about the machine and the versions that the results belong to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from separate import SEPARATE
from servers import nginx_path

__all__ = ["machine_facts"]

_PACKAGES: Final = ("mpreader", "torch", "s3torchconnector", "s3torchconnectorclient", "boto3", "obstore", "s3fs",
                    "aiobotocore", "runai-model-streamer", "runai-model-streamer-s3", "safetensors",
                    "numpy", "isal")  # fmt: skip


def machine_facts(server: str) -> dict[str, Any]:
    """Cores, memory, kernel, versions, commit, for the results files.

    Args:
        server: Kind of the server, as in ``Servers.kind``.
    """
    return {
        "cpu": _first_value("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _first_value("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "server": f"{server} {_output([nginx_path() or 'nginx', '-v'])}" if server == "nginx" else server,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _first_value(file: str, key: str) -> str:
    for line in Path(file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def _version(package: str) -> str | None:
    # s3fs and its botocore are in a folder of their own, which is not on the path of this process.
    found = distributions(name=package, path=[str(SEPARATE), *sys.path])
    return next((distribution.version for distribution in found), None)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
