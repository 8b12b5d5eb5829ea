"""Examination of the doctor: all checks, those of the host first, then those of the access to S3.

``mpreader doctor`` calls :func:`examine` and prints the findings. The checks are in the modules beside this one.
"""

from __future__ import annotations

import sys

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.tools.doctor.access import examine_access
from mpreader.tools.doctor.facts import HostFacts
from mpreader.tools.doctor.finding import Finding
from mpreader.tools.doctor.host import examine_host

__all__ = ["examine"]


def examine(
    source: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> list[Finding]:
    """Check the host, the settings, the credentials and the access to S3. Takes six seconds at most.

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
    findings = examine_host(HostFacts.now(), s3client_config, pool_config or PoolConfig())
    return [*findings, *examine_access(source, s3client_config)]
