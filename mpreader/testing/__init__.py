"""Test servers: an embedded S3, and a range server that injects faults by schedule.

Both are context managers that leave nothing behind, need no network and no credentials, and are meant for
users' own tests as much as for mpreader's. The library must not import them, but for ``mpreader demo``; an import
contract checks that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpreader.testing.fault import Fault as Fault
    from mpreader.testing.fault import FaultKind as FaultKind
    from mpreader.testing.fault import random_faults as random_faults
    from mpreader.testing.fault import scattered_faults as scattered_faults
    from mpreader.testing.fault_server import FaultedRequest as FaultedRequest
    from mpreader.testing.fault_server import FaultServer as FaultServer
    from mpreader.testing.request_log import S3Request as S3Request
    from mpreader.testing.s3_server import S3Server as S3Server

# Imported lazily: `python -m mpreader.testing.s3_server` would warn if its module were imported already.
_HOME_OF = {
    "Fault": "mpreader.testing.fault",
    "FaultKind": "mpreader.testing.fault",
    "random_faults": "mpreader.testing.fault",
    "scattered_faults": "mpreader.testing.fault",
    "FaultServer": "mpreader.testing.fault_server",
    "FaultedRequest": "mpreader.testing.fault_server",
    "S3Server": "mpreader.testing.s3_server",
    "S3Request": "mpreader.testing.request_log",
}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
