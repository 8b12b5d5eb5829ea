"""Check of what a service says of the versions of its objects.

Without it a load can't notice that an object is overwritten while it is read. :mod:`mpreader.tools.doctor.access` asks
the service; this module judges the answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpreader.pool.worker.version import Validators
from mpreader.tools.doctor.finding import Finding

__all__ = ["version_findings"]


def version_findings(validators: Validators | None) -> Iterator[Finding]:
    """A finding if a service has sent no validators with an object; ``validators`` is None if none was read."""
    if validators is None or validators:
        return
    problem = (
        "the service says nothing by which versions are told apart: bytes of an object that is overwritten while it is "
        "read may be mixed"
    )
    remedy = "write each checkpoint under a name of its own, and never over one that may be being read"
    yield Finding("object versions", "warn", "no ETag, no Last-Modified", problem, remedy)
