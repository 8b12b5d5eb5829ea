"""Examination of the doctor: all checks, those of the host first, then those of S3 and of safetensors files.

``mpreader doctor`` calls :func:`examine` and prints the findings. The checks are in the modules beside this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import wait
from typing import Final

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.tools.doctor.access import begin, examine_access
from mpreader.tools.doctor.facts import HostFacts
from mpreader.tools.doctor.finding import Finding
from mpreader.tools.doctor.host import examine_host
from mpreader.tools.doctor.safetensors import safetensors_findings

__all__ = ["examine"]

_LIMIT_S: Final = 10.0  # for the headers of safetensors files


def examine(
    source: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> list[Finding]:
    """Check the host, the settings, the credentials and the access to S3, in six seconds at most.

    Where all of that is right, safetensors files are checked, too, in ten seconds more.

    Args:
        source: ``s3://bucket`` or ``s3://bucket/prefix`` that is to be read. None: only the service is asked.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.

    Raises:
        ConfigError: ``source`` is no ``s3://`` URI.
    """
    if sys.platform != "linux":
        # The other checks read /proc and /dev/shm, and would fail.
        return [Finding("system", "fail", sys.platform, "mpreader runs on Linux only", "docker run -it python:3.12")]
    s3client_config = s3client_config or S3ClientConfig()
    pool_config = pool_config or PoolConfig()
    findings = [
        *examine_host(HostFacts.now(), s3client_config, pool_config),
        *examine_access(source, s3client_config),
    ]
    # What a finding says already would be said once more of each file.
    if source and all(finding.status != "fail" for finding in findings):
        findings += _examine_files(source, s3client_config, pool_config)
    return findings


def _examine_files(source: str, s3client_config: S3ClientConfig, pool_config: PoolConfig) -> Iterator[Finding]:
    asked = begin(lambda: safetensors_findings(source, s3client_config, pool_config))
    if wait([asked], _LIMIT_S).done:
        yield from asked.result()
    else:
        problem = f"their headers were not read within {_LIMIT_S:g} s: nothing is known of them"
        yield Finding("safetensors", "warn", source, problem, f"measure the connection: mpreader bench {source}")
