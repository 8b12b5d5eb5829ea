"""Every error that mpreader raises on purpose.

Each class carries its facts as attributes, says what to do in its message, and survives pickling
(errors cross process borders in ``torch.distributed`` and in DataLoader workers).

``PoolClosed`` / ``ArenaClosed`` mean *you closed it*; the other pool and arena errors mean *it broke*.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "AccessDenied",
    "ArenaClosed",
    "ArenaError",
    "ArenaExhausted",
    "ChecksumMismatch",
    "ConfigError",
    "MpreaderError",
    "ObjectChanged",
    "ObjectMissing",
    "PlanError",
    "PoolClosed",
    "PoolError",
    "PoolTimeout",
    "ShortRead",
    "TransportError",
    "WorkerCrashed",
]


def _rebuild(cls: type[MpreaderError], args: tuple[Any, ...], facts: dict[str, Any]) -> MpreaderError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class MpreaderError(Exception):
    """The base of all errors of mpreader."""

    def needed_for(self, tensor: str) -> Self:
        """The same error, for somebody who knows tensors and not byte ranges."""
        error = copy.copy(self)
        error.args = (f"{self.args[0]} [needed for {tensor!r}]", *self.args[1:])
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with args alone and lose the keyword-only facts.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(MpreaderError, ValueError):
    """A setting has a wrong type or value, or contradicts another one."""


class PlanError(MpreaderError, ValueError):
    """The requested ranges can't be read: malformed, or outside the object."""


class TransportError(MpreaderError):
    """Bytes of an object could not be had.

    Attributes:
        bucket: The bucket, or the host of an http(s) source.
        key: The key, or the path of an http(s) source.
        range: ``(start, end)`` in bytes of the object, end exclusive; None where no range was asked for.
        attempts: How many requests were made for it.
    """

    def __init__(
        self,
        message: str,
        *,
        bucket: str = "",
        key: str = "",
        range: tuple[int, int] | None = None,
        attempts: int = 0,
    ) -> None:
        super().__init__(message)
        self.bucket = bucket
        self.key = key
        self.range = range
        self.attempts = attempts


class ObjectMissing(TransportError, FileNotFoundError):
    """There is no such object or bucket."""


class AccessDenied(TransportError, PermissionError):
    """The service refused the request: credentials missing, wrong, expired, or not allowed to."""


class ObjectChanged(TransportError):
    """The object was overwritten while it was read; no bytes of two versions were mixed."""


class ShortRead(TransportError):
    """The service kept sending fewer bytes than it promised."""


class ChecksumMismatch(TransportError):
    """Bytes arrived that don't match the checksum stored with them."""


class PoolError(MpreaderError):
    """The worker pool can't do its work."""


class PoolClosed(PoolError):
    """The pool, fetcher or reader was closed by its owner."""


class PoolTimeout(PoolError, TimeoutError):
    """Work was not done within its deadline (``PoolConfig.timeout_s``, or a call's ``timeout_s``)."""


class WorkerCrashed(PoolError):
    """Worker processes died, or could not be started, more often than is worth another try.

    Attributes:
        exitcode: Exit status of the last worker that died; negative is the signal that killed it.
        ranges: The ``(start, end)`` byte ranges, end exclusive, that were being read then.
    """

    def __init__(self, message: str, *, exitcode: int | None = None, ranges: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.ranges = ranges


class ArenaError(MpreaderError):
    """Shared memory can't be had."""


class ArenaExhausted(ArenaError):
    """All shared memory that ``PoolConfig.max_memory`` allows is held by views that are still in use."""


class ArenaClosed(ArenaError):
    """The arena was closed by its owner."""
