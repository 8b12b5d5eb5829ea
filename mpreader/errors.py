"""Errors: every class that mpreader raises on purpose, besides ``ValueError`` and ``TypeError`` for wrong arguments.

All packages use them, so this module must not import any. Each error has its facts as attributes, says in its message
what to do, and survives pickling: errors cross process borders in ``torch.distributed`` and in DataLoader workers.

There are different errors for something that *was closed* and something that *broke*. ``PoolClosed`` and
``ArenaClosed`` mean that the program used something after closing it, and needs a correction. ``WorkerCrashed``,
``PoolTimeout`` and ``ArenaExhausted`` mean that something open could not do its work: check the host and the settings.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it since Python 3.11

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
    # Without __init__, whose keyword arguments differ by class. The attributes hold all facts, and also those that were
    # set later, such as notes.
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class MpreaderError(Exception):
    """Base of all errors of mpreader."""

    def needed_for(self, tensor: str) -> Self:
        """Return a copy of the error whose message also names the tensor that needed the bytes."""
        error = copy.copy(self)  # a copy, since other readers of the same bytes may get the same error object
        error.args = (f"{self.args[0]} [needed for {tensor!r}]", *self.args[1:])
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call __init__ with args only, and lose the facts that are keyword arguments.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(MpreaderError, ValueError):
    """A setting has a wrong type or value, or contradicts another one. Raised before any request is made for it."""


class PlanError(MpreaderError, ValueError):
    """The requested ranges can't be read: they are malformed, or outside of the object."""


class TransportError(MpreaderError):
    """Bytes of an object could not be read or written.

    Attributes:
        bucket: The bucket, or the host of an http(s) source.
        key: The key, or the path of an http(s) source.
        range: ``(start, end)`` in bytes of the object, end exclusive; None if the request had no range.
        attempts: Number of requests that were made; 0 if it failed before the first one.
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
    """The service refused the request: the credentials are missing, wrong, expired, or don't allow it."""


class ObjectChanged(TransportError):
    """The object was overwritten while it was read. No bytes of two versions were mixed.

    It is noticed by all that the server says of a version: the ETag, Last-Modified, numbers of versions, checksums.
    Where a server says nothing of that, it is noticed only if the size differs.
    """


class ShortRead(TransportError):
    """The service sent fewer bytes than it promised, in every attempt. No short result is handed out."""


class ChecksumMismatch(TransportError):
    """All requested bytes arrived, but they don't match the checksum stored with them."""


class PoolError(MpreaderError):
    """Base of the errors of the worker pool; raised itself if the pool can't be started."""


class PoolClosed(PoolError):
    """The program used a pool, fetcher, stream or read that it had closed, or had begun before a fork.

    Nothing broke. A pool that breaks raises :class:`WorkerCrashed` or :class:`PoolTimeout`, and can be used again; a
    closed pool can't.
    """


class PoolTimeout(PoolError, TimeoutError):
    """Work was not done within its deadline (``PoolConfig.timeout_s``, or a call's ``timeout_s``).

    Only this piece of work was given up: the pool is still open, unlike after :class:`PoolClosed`.
    """


class WorkerCrashed(PoolError):
    """Worker processes died, or could not be started, so often that the pool gave up.

    The pool broke; if the program had closed it, the error would be :class:`PoolClosed`. The pool's next use starts new
    workers.

    Attributes:
        exitcode: Exit status of the last worker that died, negative if a signal killed it; None if it is not known.
        ranges: The ``(start, end)`` byte ranges, end exclusive, that were being read at that time.
    """

    def __init__(self, message: str, *, exitcode: int | None = None, ranges: tuple[tuple[int, int], ...] = ()) -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.ranges = ranges


class ArenaError(MpreaderError):
    """Base of the errors of shared memory; raised itself if the host has too little shared memory."""


class ArenaExhausted(ArenaError):
    """All shared memory that ``PoolConfig.max_memory`` allows is held by views in use, or would be by this request.

    The arena is open, unlike after :class:`ArenaClosed`, and has room again when views are dropped.
    """


class ArenaClosed(ArenaError):
    """Shared memory was requested after its pool had been closed; make a new pool.

    Memory was not short, which would be :class:`ArenaExhausted` or a plain :class:`ArenaError`.
    """
