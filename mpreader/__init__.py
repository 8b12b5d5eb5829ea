"""mpreader loads large PyTorch Distributed Checkpoints from S3 through worker processes and shared memory.

The package root has the public names. Importing it must import neither torch nor boto3 nor numpy: the module of each
name is imported when the name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpreader.version import __version__ as __version__

# For type checkers and editors, which can't follow __getattr__. "as" marks a name as exported.
if TYPE_CHECKING:
    from mpreader.config import PoolConfig as PoolConfig
    from mpreader.config import S3ClientConfig as S3ClientConfig
    from mpreader.errors import AccessDenied as AccessDenied
    from mpreader.errors import ArenaClosed as ArenaClosed
    from mpreader.errors import ArenaError as ArenaError
    from mpreader.errors import ArenaExhausted as ArenaExhausted
    from mpreader.errors import ChecksumMismatch as ChecksumMismatch
    from mpreader.errors import ConfigError as ConfigError
    from mpreader.errors import MpreaderError as MpreaderError
    from mpreader.errors import ObjectChanged as ObjectChanged
    from mpreader.errors import ObjectMissing as ObjectMissing
    from mpreader.errors import PlanError as PlanError
    from mpreader.errors import PoolClosed as PoolClosed
    from mpreader.errors import PoolError as PoolError
    from mpreader.errors import PoolTimeout as PoolTimeout
    from mpreader.errors import ShortRead as ShortRead
    from mpreader.errors import TransportError as TransportError
    from mpreader.errors import WorkerCrashed as WorkerCrashed
    from mpreader.fetch.aio import AsyncRangeFetcher as AsyncRangeFetcher
    from mpreader.fetch.fetcher import RangeFetcher as RangeFetcher
    from mpreader.fetch.fetcher import RangeStream as RangeStream
    from mpreader.fetch.fetcher import fetch_ranges as fetch_ranges
    from mpreader.ranges import ItemRange as ItemRange
    from mpreader.ranges import RangeGroup as RangeGroup
    from mpreader.readers.base import S3Reader as S3Reader
    from mpreader.readers.client import S3Client as S3Client
    from mpreader.readers.constructor import DCPOptimizedConstructor as DCPOptimizedConstructor
    from mpreader.readers.dcp_optimized import DCPOptimizedS3Reader as DCPOptimizedS3Reader
    from mpreader.readers.kinds import S3ReaderConstructor as S3ReaderConstructor
    from mpreader.readers.multiprocess import MultiprocessS3Reader as MultiprocessS3Reader
    from mpreader.readers.multiprocess_constructor import MultiprocessConstructor as MultiprocessConstructor
    from mpreader.readers.ranged import RangedS3Reader as RangedS3Reader
    from mpreader.readers.sequential import SequentialS3Reader as SequentialS3Reader
    from mpreader.telemetry.timeline import Timeline as Timeline
    from mpreader.telemetry.timeline import record_timeline as record_timeline

# Module of each public name; must have the same names as the imports above.
_HOME_OF = {
    "S3ClientConfig": "mpreader.config",
    "PoolConfig": "mpreader.config",
    "AsyncRangeFetcher": "mpreader.fetch.aio",
    "RangeFetcher": "mpreader.fetch.fetcher",
    "RangeStream": "mpreader.fetch.fetcher",
    "fetch_ranges": "mpreader.fetch.fetcher",
    "ItemRange": "mpreader.ranges",
    "RangeGroup": "mpreader.ranges",
    "S3Reader": "mpreader.readers.base",
    "S3ReaderConstructor": "mpreader.readers.kinds",
    "DCPOptimizedConstructor": "mpreader.readers.constructor",
    "MultiprocessConstructor": "mpreader.readers.multiprocess_constructor",
    "SequentialS3Reader": "mpreader.readers.sequential",
    "RangedS3Reader": "mpreader.readers.ranged",
    "DCPOptimizedS3Reader": "mpreader.readers.dcp_optimized",
    "MultiprocessS3Reader": "mpreader.readers.multiprocess",
    "S3Client": "mpreader.readers.client",
    "Timeline": "mpreader.telemetry.timeline",
    "record_timeline": "mpreader.telemetry.timeline",
    "AccessDenied": "mpreader.errors",
    "ArenaClosed": "mpreader.errors",
    "ArenaError": "mpreader.errors",
    "ArenaExhausted": "mpreader.errors",
    "ChecksumMismatch": "mpreader.errors",
    "ConfigError": "mpreader.errors",
    "MpreaderError": "mpreader.errors",
    "ObjectChanged": "mpreader.errors",
    "ObjectMissing": "mpreader.errors",
    "PlanError": "mpreader.errors",
    "PoolClosed": "mpreader.errors",
    "PoolError": "mpreader.errors",
    "PoolTimeout": "mpreader.errors",
    "ShortRead": "mpreader.errors",
    "TransportError": "mpreader.errors",
    "WorkerCrashed": "mpreader.errors",
}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    # Python calls it for a name that the module does not have (PEP 562).
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    # Names that were not used yet are not in globals(), but completion should offer them.
    return sorted([*globals(), *_HOME_OF])
