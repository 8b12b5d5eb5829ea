"""Errors: every class that mpreader raises on purpose, besides ``ValueError`` and ``TypeError`` for wrong arguments.

Each carries its facts as attributes, says in its message what to do, and survives pickling: errors cross process
borders in ``torch.distributed`` and in DataLoader workers.

Something that *was closed* and something that *broke* are different errors. ``PoolClosed`` and ``ArenaClosed`` mean
that the program went on to use what it had closed: it is to be corrected. ``WorkerCrashed``, ``PoolTimeout`` and
``ArenaExhausted`` mean that what is open could not do its work: the host or the settings are to be looked at.
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
    # Not by calling the class: facts that were set later, such as notes, are among those that must come along.
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class MpreaderError(Exception):
    """Base of all errors of mpreader."""

    def needed_for(self, tensor: str) -> Self:
        """Return a copy of the error that also names the tensor it was raised for."""
        error = copy.copy(self)  # another consumer of the same bytes may be given the original
        error.args = (f"{self.args[0]} [needed for {tensor!r}]", *self.args[1:])
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with args alone and lose the keyword-only facts.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(MpreaderError, ValueError):
    """A setting has a wrong type or value, or contradicts another one. Raised before any request is made for it."""


class PlanError(MpreaderError, ValueError):
    """The requested ranges can't be read: malformed, or outside the object."""


class TransportError(MpreaderError):
    """Bytes of an object could not be had.

    Attributes:
        bucket: The bucket, or the host of an http(s) source.
        key: The key, or the path of an http(s) source.
        range: ``(start, end)`` in bytes of the object, end exclusive; None where no range was asked for.
        attempts: Number of requests that were made for it.
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
    """The service kept sending fewer bytes than it promised, in every attempt. No short result is handed out."""


class ChecksumMismatch(TransportError):
    """Bytes arrived, as many as were asked for, that don't match the checksum stored with them."""


class PoolError(MpreaderError):
    """Base of the errors of the worker pool; itself raised where the pool can't be started."""


class PoolClosed(PoolError):
    """The program used a pool, fetcher, stream or read that it had closed, or had begun before a fork.

    Nothing broke: a pool that does raises :class:`WorkerCrashed` or :class:`PoolTimeout`, and can be used again; a
    closed one can't.
    """


class PoolTimeout(PoolError, TimeoutError):
    """Work was not done within its deadline (``PoolConfig.timeout_s``, or a call's ``timeout_s``).

    The pool is still open, unlike after :class:`PoolClosed`; only this piece of work was given up.
    """


class WorkerCrashed(PoolError):
    """Worker processes died, or could not be started, more often than is worth another try.

    The pool broke; nobody closed it, which would be :class:`PoolClosed`. Its next use starts new workers.

    Attributes:
        exitcode: Exit status of the last worker that died; negative is the signal that killed it.
        ranges: The ``(start, end)`` byte ranges, end exclusive, that were being read then.
    """

    def __init__(self, message: str, *, exitcode: int | None = None, ranges: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.ranges = ranges


class ArenaError(MpreaderError):
    """Shared memory can't be had: the host has too little of it, or one of the errors below."""


class ArenaExhausted(ArenaError):
    """All shared memory that ``PoolConfig.max_memory`` allows is held by views that are still in use, or would be.

    The arena is open and whole, unlike after :class:`ArenaClosed`: as views are dropped, it has room again.
    """


class ArenaClosed(ArenaError):
    """Shared memory was asked of an arena after its pool had been closed; make a new pool.

    There was no shortage, which would be :class:`ArenaExhausted` or a plain :class:`ArenaError`.
    """
