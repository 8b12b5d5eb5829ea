"""Settings of S3 and of the worker pool: frozen dataclasses that check their values when they are made.

Used wherever a client or a pool is made, and by the command line. A ``PoolConfig`` field that is None takes its
``MPREADER_*`` environment variable, else the default in ``POOL_SETTINGS``, else (where that table has none) a value
that :mod:`mpreader.pool.sizing` derives from the host. This module must not look at the host or reach S3.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from mpreader.errors import ConfigError

__all__ = [
    "KiB",
    "MAX_OBJECT_BYTES",
    "MiB",
    "POOL_SETTINGS",
    "PoolConfig",
    "S3ClientConfig",
    "SIGNINGS",
    "Setting",
    "check_type",
]

KiB: Final = 1024
MiB: Final = 1024 * 1024
GiB: Final = 1024 * MiB

# No object is larger (S3 takes 50 TB): a service that says so is wrong, and plans for such a size would fill memory.
MAX_OBJECT_BYTES: Final = 1 << 46
SIGNINGS: Final = ("auto", "query", "headers")  # values of ``S3ClientConfig.signing``
MIN_PART_BYTES: Final = 64 * KiB  # least ``PoolConfig.part_size``
_UNITS: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB}


def parse_bytes(text: str) -> int:
    """Parse a number of bytes: ``"67108864"``, ``"64M"``, ``"64MiB"``, ``"1.5G"`` (powers of 1024).

    Raises:
        ValueError: ``text`` is none of these.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"not a number of bytes: {text!r}; write 67108864 or 64MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(number: int) -> str:
    """Write a number of bytes for :func:`parse_bytes`, in the largest unit that needs no fraction, such as ``8MiB``."""
    for size, unit in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if number and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_int(name: str, value: object, least: int) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,  # True is an int, too
        f"{name} must be a whole number of at least {least}, got {value!r}",
    )


def _require_number(name: str, value: object, unit: str) -> None:
    _require(
        # NaN is neither above 0 nor below infinity.
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"),
        f"{name} must be a number of {unit} above 0, got {value!r}",
    )


def check_type(name: str, value: object, cls: type) -> None:
    """Check that an argument is None or an instance of a class.

    Without this check a wrong type, such as a dict in place of a configuration, would be noticed only later, where a
    field is needed, with an error that does not name the argument.

    Args:
        name: Name of the argument, for the error.
        value: Its value.
        cls: Class that it must have.

    Raises:
        TypeError: ``value`` is something else.
    """
    if value is not None and not isinstance(value, cls):
        raise TypeError(f"{name} must be a {cls.__name__} or None, got {type(value).__name__}")


@dataclass(frozen=True)
class S3ClientConfig:
    """Settings of S3. They never hold credentials: those come from where boto3 looks for them.

    The fields that s3torchconnector's class of this name also has, have the same meaning as there.

    Args:
        region: AWS region, such as ``"us-east-1"``. None: the environment's. A bucket in another region is found there
            all the same.
        endpoint_url: URL of an S3-compatible service. None: ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, or AWS.
        profile: Name of a profile of the AWS configuration files.
        part_size: Bytes of one request, for reading and for writing (5 MiB to 5 GiB).
        unsigned: Send requests without credentials (public buckets).
        force_path_style: Put the bucket into the URL's path, not into the host name.
        max_attempts: Largest number of requests that are made for the same bytes.
        requester_pays: Agree to pay for the requests, as requester-pays buckets demand.
        signing: Place of the workers' signatures: ``"query"`` of presigned URLs, ``"headers"``, or ``"auto"``: the
            query, and headers for buckets that are found to refuse it.
        throughput_target_gbps: Open only the connections needed for this many gigabits per second, at the
            90 MB/s that S3 gives a connection. None: as many as ``PoolConfig.connections_per_worker`` says.

    Raises:
        ConfigError: A field has a wrong type or value.
    """

    region: str | None = None
    endpoint_url: str | None = None
    profile: str | None = None
    part_size: int = 8 * MiB
    unsigned: bool = False
    force_path_style: bool = False
    max_attempts: int = 10
    requester_pays: bool = False
    throughput_target_gbps: float | None = None
    signing: Literal["auto", "query", "headers"] = "auto"

    def __post_init__(self) -> None:
        for name in ("region", "endpoint_url", "profile"):
            value = getattr(self, name)
            _require(value is None or (isinstance(value, str) and value != ""), f"{name} must be text, got {value!r}")
        for name in ("unsigned", "force_path_style", "requester_pays"):
            _require(isinstance(getattr(self, name), bool), f"{name} must be True or False")
        _require(self.signing in SIGNINGS, f"signing must be one of {', '.join(SIGNINGS)}, got {self.signing!r}")
        _require_int("part_size", self.part_size, 5 * MiB)
        _require(self.part_size <= 5 * GiB, f"part_size must be at most 5 GiB, got {self.part_size}")
        _require_int("max_attempts", self.max_attempts, 1)
        if self.throughput_target_gbps is not None:
            _require_number("throughput_target_gbps", self.throughput_target_gbps, "gigabits per second")
        if self.endpoint_url is not None:
            _require(
                self.endpoint_url.startswith(("http://", "https://")),
                f"endpoint_url must start with http:// or https://, got {self.endpoint_url!r}",
            )


@dataclass(frozen=True)
class Setting:
    """Unit and default of a field of ``PoolConfig``; the description of the field is in the class's docstring.

    Attributes:
        unit: Unit of the field's values; a value in "bytes" may be given as ``64MiB`` in the environment.
        default: Value if neither field nor environment variable is set; None: derived from the host.
    """

    unit: str
    default: int | float | None


# The one place of each default: fields, README and command line take it from here, or are tested against it.
POOL_SETTINGS: Final[Mapping[str, Setting]] = {
    "workers": Setting("processes", None),
    "connections_per_worker": Setting("connections", None),
    "max_memory": Setting("bytes", None),
    "part_size": Setting("bytes", None),
    "connect_timeout_s": Setting("seconds", 10.0),
    "stall_timeout_s": Setting("seconds", 20.0),
    "timeout_s": Setting("seconds", 300.0),
    "worker_timeout_s": Setting("seconds", 15.0),
    "lease_timeout_s": Setting("seconds", 10.0),
    "idle_timeout_s": Setting("seconds", 60.0),
}


@dataclass(frozen=True)
class PoolConfig:
    """Settings of the worker pool; None takes ``MPREADER_<FIELD>``, else the default.

    Args:
        workers: Worker processes. Default: the cores of this process's share of the host, 8 at most.
        connections_per_worker: Connections that each worker keeps open. Default 16, or as many as
            ``S3ClientConfig.throughput_target_gbps`` needs.
        max_memory: Bytes of shared memory that the pool may reserve at one time. Default: what the host can spare
            (half of the free memory under the cgroup's limit; where the kernel has no ``memfd_create``, 80 % of free
            ``/dev/shm`` at most), divided by the ranks that share the host. What is read ahead is far less than that;
            see ``mpreader.pool.sizing``.
        part_size: Most bytes of one ranged GET (64 KiB to 5 GiB). Default: ``S3ClientConfig.part_size``, less where
            ``max_memory`` is small.
        connect_timeout_s: Seconds to wait for a connection, TLS included. Default 10.
        stall_timeout_s: A connection that brings less than 256 KiB in this many seconds is replaced. Default 20.
        timeout_s: Seconds for one part, all its attempts together. Default 300.
        worker_timeout_s: A worker process that is silent for this many seconds is killed and replaced. Default 15.
        lease_timeout_s: Seconds to wait for held views to end when memory is full. Default 10.
        idle_timeout_s: A pool unused for this many seconds gives back its processes and memory, and starts again
            when needed. Default 60.

    Raises:
        ConfigError: A field, or its environment variable, has a wrong type or value.
    """

    workers: int | None = None
    connections_per_worker: int | None = None
    max_memory: int | None = None
    part_size: int | None = None
    connect_timeout_s: float | None = None
    stall_timeout_s: float | None = None
    timeout_s: float | None = None
    worker_timeout_s: float | None = None
    lease_timeout_s: float | None = None
    idle_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_pool_field(field.name, getattr(self, field.name))

    def value(self, name: str) -> Any:
        """Return the value of a field that is in force.

        Args:
            name: Name of the field.

        Returns:
            The field's value, else that of its environment variable, else the default; None if that is to be derived
            from the host.

        Raises:
            ConfigError: The field's environment variable has a wrong value.
        """
        # The environment is read at each use, not when the object was made: later changes count as well.
        given = getattr(self, name)
        if given is None:
            given = _from_environment(name)
        return POOL_SETTINGS[name].default if given is None else given


def _check_pool_field(name: str, value: object) -> None:
    if value is None:  # not set: environment, table or host decide
        return
    if name.endswith("_s"):  # by their names, the fields in seconds
        _require_number(name, value, "seconds")
    elif name == "part_size":
        _require_int(name, value, MIN_PART_BYTES)
        _require(isinstance(value, int) and value <= 5 * GiB, f"part_size must be at most 5 GiB, got {value!r}")
    elif name == "max_memory":
        _require_int(name, value, 4 * MIN_PART_BYTES)  # room for four of the smallest parts
    else:
        _require_int(name, value, 1)


def _from_environment(name: str) -> int | float | None:
    """Return the value of a field's environment variable; None if it is not set, or empty."""
    variable = f"MPREADER_{name.upper()}"
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        value = parse_bytes(text) if POOL_SETTINGS[name].unit == "bytes" else _parse_number(name, text)
        _check_pool_field(name, value)
    except ValueError as error:
        raise ConfigError(f"environment variable {variable}={text!r}: {error}") from None
    return value


def _parse_number(name: str, text: str) -> int | float:
    convert, expected = (float, "a number") if name.endswith("_s") else (int, "a whole number")
    try:
        return convert(text)
    except ValueError:
        raise ValueError(f"not {expected}") from None
