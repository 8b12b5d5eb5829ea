"""How fast a source is read with given settings: timed, with workers that are up already; bytes are dropped at once."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from mpreader.config import KiB, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ObjectMissing, PlanError, PoolTimeout
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.sources.http import HttpSource
from mpreader.tools.bench.memory import tree_memory_bytes

__all__ = [
    "Measurement",
    "Settings",
    "SourceObject",
    "Trials",
    "binary_bytes",
    "find_objects",
    "passes",
    "without_secrets",
]

_MOST_LISTED: Final = 10_000
_WARM_UP_BYTES: Final = 64 * KiB
_WARM_UP_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What is swept: fields of ``PoolConfig``, sizes in bytes."""

    workers: int
    connections_per_worker: int
    part_size: int

    @property
    def connections(self) -> int:
        """Connections of all workers."""
        return self.workers * self.connections_per_worker

    @property
    def cost(self) -> tuple[int, int, int]:
        """What is leaner sorts first: fewer connections, then less memory in flight, then fewer processes."""
        return self.connections, self.connections * self.part_size, self.workers

    def environment(self) -> dict[str, str]:
        """The variables that make them the defaults."""
        values = {**asdict(self), "part_size": binary_bytes(self.part_size)}
        return {f"MPREADER_{name.upper()}": str(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One reading of bytes that were dropped at once, with workers that were up already.

    Attributes:
        nbytes: Bytes that were taken.
        seconds: How long it took, planning and HEAD requests included.
        cpu_seconds: Processor time of this process and the workers.
        requests: GETs made.
        retries: GETs that were made again.
        memory_bytes: Memory that workers and shared memory have taken, the latter counted once.
    """

    nbytes: int
    seconds: float
    cpu_seconds: float
    requests: int
    retries: int
    memory_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9 bytes) per second."""
        return self.nbytes / self.seconds / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor seconds per gigabyte; 0 where nothing was received."""
        return self.cpu_seconds / self.nbytes * 1e9 if self.nbytes else 0.0


@dataclass(frozen=True, slots=True)
class SourceObject:
    """An object that is read, ``nbytes`` large."""

    source: str
    nbytes: int


def find_objects(source: str, nbytes: int, s3client_config: S3ClientConfig) -> list[SourceObject]:
    """The object, or the largest ones below the prefix: as many as have ``nbytes`` together, if there are so many.

    Raises:
        PlanError: There are objects, but all are empty.
        ObjectMissing: There is none.
    """
    if source.startswith("s3://"):
        found = _find_on_s3(source, s3client_config)
    else:
        found = [SourceObject(source, HttpSource(source, s3client_config.max_attempts).open().size)]
    largest = sorted((item for item in found if item.nbytes), key=lambda item: item.nbytes, reverse=True)
    if not largest:
        raise PlanError(f"{without_secrets(source)} is empty: there is nothing to measure with")
    before = itertools.accumulate((item.nbytes for item in largest), initial=0)
    return [item for item, others in zip(largest, before, strict=False) if others < nbytes]


def without_secrets(source: str) -> str:
    """The source as it may be shown: a URL without user name, password and query."""
    return source if source.startswith("s3://") else HttpSource(source).uri


def binary_bytes(number: int) -> str:
    """As ``parse_bytes`` reads it: ``8MiB``."""
    for size, unit in ((MiB, "MiB"), (KiB, "KiB")):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def _find_on_s3(source: str, s3client_config: S3ClientConfig) -> list[SourceObject]:
    from mpreader.readers.client import S3Client
    from mpreader.s3 import parse_s3_uri

    bucket, key = parse_s3_uri(source)
    client = S3Client(s3client_config=s3client_config)
    try:
        missing = ObjectMissing(f"{source}: there are no objects below it", bucket=bucket, key=key)
        if key and not key.endswith("/"):
            try:
                return [SourceObject(source, client.head_object(bucket, key).size)]
            except ObjectMissing as error:
                missing = error
        prefix = f"{key.rstrip('/')}/" if key else ""
        pages = client.list_objects(bucket, prefix)
        listed = itertools.islice((info for page in pages for info in page.object_info), _MOST_LISTED)
        found = [SourceObject(f"s3://{bucket}/{info.key}", info.size) for info in listed]
        if not found:
            raise missing
        return found
    finally:
        client.close()


def passes(objects: Sequence[SourceObject], nbytes: int, part_size: int) -> Iterator[dict[str, list[tuple[int, int]]]]:
    """Ranges of at most ``part_size`` bytes, ``nbytes`` together; in more than one pass where the objects have less."""
    left = nbytes
    while left:
        ranges: dict[str, list[tuple[int, int]]] = {}
        for item in objects:
            size = min(item.nbytes, left)
            left -= size
            if size:
                ranges[item.source] = [(start, min(start + part_size, size)) for start in range(0, size, part_size)]
        yield ranges


class Trials:
    """Measures settings on one source, each time with ``nbytes`` bytes."""

    def __init__(
        self, objects: Sequence[SourceObject], nbytes: int, share_s: float, s3client_config: S3ClientConfig
    ) -> None:
        self.nbytes = nbytes
        self._objects = objects
        self._share_s = share_s
        self._s3client_config = s3client_config

    def calibrate(self, settings: Settings, on_bytes: Callable[[int], object]) -> None:
        """Read as much as can be read in the time for one measurement; the others then read no more than that.

        Raises:
            PoolTimeout: Nothing has come.
        """
        self.nbytes = self._timed(settings, self._share_s, on_bytes).nbytes
        if not self.nbytes:
            raise PoolTimeout(
                f"not one part was received in {self._share_s:.3g} s: allow more seconds, or smaller parts"
            )

    def measure(self, settings: Settings, on_bytes: Callable[[int], object]) -> Measurement:
        """Measure once."""
        measurement = self._timed(settings, 2 * self._share_s, on_bytes)
        on_bytes(self.nbytes - measurement.nbytes)  # what was cut off will not come
        return measurement

    def _timed(self, settings: Settings, limit_s: float, on_bytes: Callable[[int], object]) -> Measurement:
        memory_before, others = tree_memory_bytes(os.getpid()), _children()
        with RangeFetcher(self._s3client_config, PoolConfig(**asdict(settings))) as fetcher:
            _warm_up(fetcher, self._objects[0], settings)
            pids, stats = _children() - others, fetcher.stats
            cpu_s, started = _cpu_seconds(pids), time.monotonic()
            nbytes = self._read(fetcher, started + limit_s, on_bytes)
            seconds = time.monotonic() - started
            cpu_s, done = _cpu_seconds(pids) - cpu_s, fetcher.stats
            memory = tree_memory_bytes(os.getpid()) - memory_before  # segments are kept until the pool ends
        requests, retries = done.requests - stats.requests, done.retries - stats.retries
        return Measurement(nbytes, seconds, cpu_s, requests, retries, max(0, memory))

    def _read(self, fetcher: RangeFetcher, deadline: float, on_bytes: Callable[[int], object]) -> int:
        taken = 0
        for ranges in passes(self._objects, self.nbytes, fetcher.part_size):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                break
            try:
                stream = fetcher.stream_many(ranges, order="completion", max_gap_size=0, timeout_s=left_s)
                for _, _, view in stream:
                    taken += len(view)
                    on_bytes(len(view))
                    del view  # or it would keep its memory while the next one is waited for
            except PoolTimeout:
                if time.monotonic() < deadline:
                    raise  # that was the time of a part
        return taken


def _warm_up(fetcher: RangeFetcher, item: SourceObject, settings: Settings) -> None:
    """Read a little for each connection, until every worker has answered."""
    stride = max(2, item.nbytes // max(2 * settings.workers, settings.connections))
    width = min(_WARM_UP_BYTES, stride // 2)  # what touches would be fetched as one
    ranges = [(start, start + width) for start in range(0, item.nbytes - width + 1, stride)]
    deadline = time.monotonic() + _WARM_UP_TIMEOUT_S
    while True:
        for _ in fetcher.stream(item.source, ranges, order="completion", max_gap_size=0):
            pass
        answered = sum(worker.requests > 0 for worker in fetcher.stats.workers)
        if answered >= min(settings.workers, len(ranges)) or time.monotonic() > deadline:
            return


def _children() -> set[int]:
    """Processes that this one has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat_fields(stat)
        if fields and int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def _cpu_seconds(pids: Iterable[int]) -> float:
    """Processor time so far, of this process and of these."""
    stats = [_stat_fields(Path(f"/proc/{pid}/stat")) for pid in pids]
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats if fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _stat_fields(stat: Path) -> list[str]:
    """What follows a process's name in its ``stat``; nothing if it has ended."""
    try:
        return stat.read_text().rpartition(")")[2].split()
    except OSError:
        return []
