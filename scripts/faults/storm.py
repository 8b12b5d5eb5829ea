"""A storm: random plans under random faults, with workers killed and objects overwritten meanwhile, all by one seed.

Each schedule must end, inside its deadline, in exactly the right bytes of one version or in one error of mpreader's;
anything else raises :class:`StormFailure`, with the seed that repeats it. For hours of it::

    scripts/soak --seconds 3600
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mpreader import MpreaderError, PoolConfig, RangeFetcher, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.testing.fault import TRANSIENT_KINDS, Fault, FaultKind, random_faults
from mpreader.testing.fault_server import FaultServer

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["Outcome", "StormFailure", "run_storm", "summary"]

DEADLINE_S: Final = 30.0
SCHEDULES_PER_POOL: Final = 8
# Errors, unless they are over soon: a load may end in one of mpreader's.
_LASTING_KINDS: Final = (
    FaultKind.OTHER_ETAG,
    FaultKind.NO_ETAG,
    FaultKind.TRICKLE,
    FaultKind.WRONG_TOTAL,
    FaultKind.STATUS,
)
_LASTING_STATUSES: Final = (403, 404, 412, 416, 503)
_POLL_S: Final = 0.002


class StormFailure(AssertionError):
    """The promise was broken; the message tells how, and the seed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one schedule ended.

    Attributes:
        plan: What was read in which way.
        result: ``"exact"``, or the name of the error's class.
        is_transient: Whether each fault struck single requests only, and nobody was killed or overwrote anything.
        faults: Answers that were spoilt.
        kills: Workers that were killed or stopped.
        seconds: Wall time.
    """

    plan: str
    result: str
    is_transient: bool
    faults: int
    kills: int
    seconds: float


def run_storm(seed: int, schedules: int) -> list[Outcome]:
    """Run schedules one after the other, some on a warm pool, some on a new one; the same for the same arguments.

    Raises:
        StormFailure: Wrong bytes, another error than mpreader's, or no end.
    """
    outcomes: list[Outcome] = []
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it is not needed here
    while len(outcomes) < schedules:
        number = len(outcomes)
        chance = random.Random(f"{seed} {number}")  # a schedule, not a secret
        count = min(SCHEDULES_PER_POOL, schedules - number)
        with _surroundings(chance, with_checkpoint=number % (4 * SCHEDULES_PER_POOL) == 0) as stage:
            outcomes += [_run_named(stage, chance, f"seed {seed}, schedule {number + index}") for index in range(count)]
    return outcomes


# -- the stage


class _Stage:
    """A server, and what reads from it."""

    def __init__(self, server: FaultServer, pool_config: PoolConfig, checkpoint: Mapping[str, torch.Tensor]) -> None:
        self.server = server
        self.pool_config = pool_config
        self.client_config = S3ClientConfig(
            "us-east-1", endpoint_url=server.endpoint_url, force_path_style=True, max_attempts=8
        )
        self.checkpoint = checkpoint
        self.fetcher = RangeFetcher(self.client_config, pool_config)


@contextlib.contextmanager
def _surroundings(chance: random.Random, *, with_checkpoint: bool) -> Iterator[_Stage]:
    files, tensors = _checkpoint() if with_checkpoint else ({}, {})
    config = PoolConfig(
        workers=chance.choice((1, 2, 3)),
        connections_per_worker=chance.choice((1, 2, 4)),
        max_memory=chance.choice((4, 8, 16)) * MiB,
        part_size=chance.choice((64, 128, 512)) * KiB,
        connect_timeout_s=2.0,
        stall_timeout_s=0.3,
        timeout_s=8.0,
        worker_timeout_s=0.6,
        lease_timeout_s=1.0,
    )
    with FaultServer(files, tls=chance.random() < 0.25) as server, _environment(server):
        stage = _Stage(server, config, tensors)
        with stage.fetcher:
            yield stage


@contextlib.contextmanager
def _environment(server: FaultServer) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(server.environment())
    if server.ca_file is not None:
        os.environ["REQUESTS_CA_BUNDLE"] = str(server.ca_file)  # for sources that are URLs
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _checkpoint() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Files of a checkpoint by their paths on the server, and what they hold."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"layer.{number}": torch.randn(rows, 128, generator=generator).to(dtype)
        for number, (rows, dtype) in enumerate([(1, torch.float64), (2000, torch.bfloat16), (700, torch.float32)] * 4)
    }
    with tempfile.TemporaryDirectory(prefix="mpreader-storm-") as folder:
        save(dict(tensors), storage_writer=FileSystemWriter(folder, thread_count=3, sync_files=False), no_dist=True)
        return {f"/storm/checkpoint/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}, tensors


# -- one schedule


class _Versions:
    """The versions of one object that there were."""

    def __init__(self, chance: random.Random) -> None:
        self.path = f"/storm/{secrets.token_hex(8)}"
        self.size = chance.choice((1, chance.randrange(1, 64 * KiB), chance.randrange(1, MiB)))
        self.contents = [chance.randbytes(self.size)]

    def require(self, pieces: Sequence[tuple[int, int, bytes]]) -> None:
        """Pieces (start, end, bytes) must all be of the same version."""
        if not any(all(content[start:end] == got for start, end, got in pieces) for content in self.contents):
            raise StormFailure(f"wrong bytes of {self.path}, or of two versions")


def _run_named(stage: _Stage, chance: random.Random, name: str) -> Outcome:
    try:
        return _run_schedule(stage, chance)
    except StormFailure as failure:
        raise StormFailure(f"{name}: {failure}") from failure.__cause__


def _run_schedule(stage: _Stage, chance: random.Random) -> Outcome:
    is_transient = chance.random() < 0.5
    plan, read, objects = _choose_plan(stage, chance)
    stage.server.inject(*_choose_faults(stage, chance, is_transient=is_transient))
    for versions in objects:
        stage.server.put(versions.path, versions.contents[0])
    mischief = _Mischief(stage.server, None if is_transient else chance, objects)
    asked_before = len(stage.server.requests)
    started = time.monotonic()
    with mischief:
        result = _end_of(plan, read)
    faults = sum(request.fault is not None for request in stage.server.requests[asked_before:])
    return Outcome(plan, result, is_transient, faults, mischief.kills, time.monotonic() - started)


def _end_of(plan: str, read: Callable[[], None]) -> str:
    """How it ends, in a thread of its own: it may be that it does not."""
    ends: list[BaseException | None] = []

    def run() -> None:
        try:
            read()
        except BaseException as error:  # noqa: BLE001  # judged by the thread that waits
            ends.append(error)
        else:
            ends.append(None)

    thread = threading.Thread(target=run, daemon=True, name="mpreader-storm")
    thread.start()
    thread.join(DEADLINE_S)
    if not ends:
        raise StormFailure(f"{plan} did not end within {DEADLINE_S:g} s")
    error = ends[0]
    if error is None:
        return "exact"
    if isinstance(error, StormFailure):
        raise error
    name = _name_of(error)
    if name is None:
        raise StormFailure(f"{plan} ended in {error!r}, which is none of mpreader's errors") from error
    return name


def _name_of(error: BaseException) -> str | None:
    """The class of mpreader's error that this is, or brings; None if it is none."""
    if isinstance(error, MpreaderError):
        return type(error).__name__
    # torch's CheckpointException has the error of each rank; of one about .metadata it keeps the text alone.
    for failure, *_ in getattr(error, "failures", {}).values():
        if isinstance(failure, MpreaderError):
            return type(failure).__name__
        if "metadata read failed: s3://" in str(failure):
            return "error about .metadata"
    return None


def _choose_plan(stage: _Stage, chance: random.Random) -> tuple[str, Callable[[], None], list[_Versions]]:
    ways = {"fetch": _fetch, "stream": _stream, "fetch_object": _fetch_object, "fetch_many": _fetch_many}
    way = chance.choice((*ways, *(["load"] * 4 if stage.checkpoint else [])))
    if way == "load":
        return way, lambda: _load(stage), []
    objects = [_Versions(chance) for _ in range(3 if way == "fetch_many" else 1)]
    plans = [_ranges(chance, versions.size) for versions in objects]
    gap = chance.choice((0, 1000, MiB))
    return way, lambda: ways[way](stage, objects, plans, gap), objects


def _ranges(chance: random.Random, size: int) -> list[tuple[int, int]]:
    """In no order, overlapping, some repeated, some empty."""
    ranges = []
    for _ in range(chance.choice((1, 5, 40))):
        start, end = sorted(chance.choices(range(size + 1), k=2))
        ranges.append((start, chance.choice((end, end, min(size, start + 100), start))))
    return ranges + ranges[:1]


def _choose_faults(stage: _Stage, chance: random.Random, *, is_transient: bool) -> list[Fault]:
    # Of three wrong answers in a row a part is given up, as is right: not where all is to be survived.
    rate = chance.choice((0.0, 0.05, 0.2) if is_transient else (0.0, 0.2, 0.4))
    faults = list(random_faults(chance.randrange(1 << 30), gets=60, rate=rate, kinds=TRANSIENT_KINDS))
    if stage.checkpoint:
        faults += _flips(stage, chance)
    if not is_transient and chance.random() < 0.5:
        kind, first = chance.choice(_LASTING_KINDS), chance.randrange(1, 10)
        status = chance.choice(_LASTING_STATUSES)
        many = range(first, first + chance.choice((1, 3, 1000)))
        faults.insert(0, Fault(kind, at=many, status=status, seconds=0.02, after_bytes=chance.randrange(1 << 16)))
    return faults


def _flips(stage: _Stage, chance: random.Random) -> Iterator[Fault]:
    """Flipped bits, where a checksum tells: in files of tensors."""
    for path in _files_of_tensors(stage):
        if chance.random() < 0.3:
            yield Fault(FaultKind.FLIPPED_BIT, at=(1,), path=path, after_bytes=chance.randrange(1 << 18))


def _files_of_tensors(stage: _Stage) -> list[str]:
    return [f"/storm/checkpoint/__0_{number}.distcp" for number in range(3)] if stage.checkpoint else []


# -- ways to read


def _fetch(stage: _Stage, objects: list[_Versions], plans: list[list[tuple[int, int]]], gap: int) -> None:
    [versions], [ranges] = objects, plans
    views = stage.fetcher.fetch(stage.server.url(versions.path), ranges, max_gap_size=gap)
    versions.require([(start, end, bytes(view)) for (start, end), view in zip(ranges, views, strict=True)])


def _stream(stage: _Stage, objects: list[_Versions], plans: list[list[tuple[int, int]]], gap: int) -> None:
    [versions], [ranges] = objects, plans
    stream = stage.fetcher.stream(stage.server.url(versions.path), ranges, max_gap_size=gap)
    pieces = [(*ranges[index], bytes(view)) for index, view in stream]
    if len(pieces) != len(ranges):
        raise StormFailure(f"{len(pieces)} of {len(ranges)} ranges came")
    versions.require(pieces)


def _fetch_object(stage: _Stage, objects: list[_Versions], _: list[list[tuple[int, int]]], __: int) -> None:
    [versions] = objects
    versions.require([(0, versions.size, bytes(stage.fetcher.fetch_object(f"s3:/{versions.path}")))])


def _fetch_many(stage: _Stage, objects: list[_Versions], plans: list[list[tuple[int, int]]], gap: int) -> None:
    wanted = {stage.server.url(versions.path): ranges for versions, ranges in zip(objects, plans, strict=True)}
    found = stage.fetcher.fetch_many(wanted, max_gap_size=gap)
    for versions, (url, ranges) in zip(objects, wanted.items(), strict=True):
        versions.require([(start, end, bytes(view)) for (start, end), view in zip(ranges, found[url], strict=True)])


def _load(stage: _Stage) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    from mpreader.dcp import S3StorageReader

    state = {name: torch.zeros_like(tensor) for name, tensor in stage.checkpoint.items()}
    with S3StorageReader(None, "s3://storm/checkpoint", stage.client_config, pool_config=stage.pool_config) as reader:
        load(dict(state), storage_reader=reader, no_dist=True)
    for name, tensor in stage.checkpoint.items():
        if not torch.equal(state[name], tensor):
            raise StormFailure(f"{name} is wrong after a load")


# -- mischief


class _Mischief:
    """A thread that kills a worker, stops one, or overwrites an object, after some requests. A context manager."""

    def __init__(self, server: FaultServer, chance: random.Random | None, objects: Sequence[_Versions]) -> None:
        self.kills = 0
        self._server = server
        self._objects = objects
        self._over = threading.Event()
        self._deeds = [] if chance is None else self._plan(chance)
        self._thread = threading.Thread(target=self._run, daemon=True, name="mpreader-mischief")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _plan(self, chance: random.Random) -> list[tuple[int, Callable[[], None]]]:
        """What to do, and after how many requests of the server's."""
        deeds, asked = [], len(self._server.requests)
        for _ in range(chance.choice((0, 1, 1, 2))):
            asked += chance.randrange(1, 8)
            deeds.append((asked, self._choose(chance)))
        return deeds

    def _choose(self, chance: random.Random) -> Callable[[], None]:
        if self._objects and chance.random() < 0.3:
            versions = chance.choice(self._objects)
            content = chance.randbytes(versions.size)
            return lambda: self._overwrite(versions, content)
        signum, which = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)), chance.randrange(1 << 16)
        return lambda: self._strike(signum, which)

    def _run(self) -> None:
        for asked, deed in self._deeds:
            while len(self._server.requests) < asked:
                if self._over.wait(_POLL_S):
                    return
            deed()

    def _overwrite(self, versions: _Versions, content: bytes) -> None:
        versions.contents.append(content)
        self._server.put(versions.path, content)

    def _strike(self, signum: int, which: int) -> None:
        pids = _worker_pids()
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[which % len(pids)], signum)
                self.kills += 1


def _worker_pids() -> list[int]:
    everyone: list[str] = []
    for task in Path("/proc/self/task").iterdir():  # a child belongs to the thread that started it
        with contextlib.suppress(OSError):
            everyone += (task / "children").read_text().split()
    return sorted({int(pid) for pid in everyone if b"mpreader.pool.worker.main" in _command(pid)})


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended meanwhile


# -- for hours


def summary(outcomes: Sequence[Outcome]) -> str:
    """What happened, in some lines."""
    results = collections.Counter(outcome.result for outcome in outcomes)
    transient = [outcome for outcome in outcomes if outcome.is_transient]
    exact = sum(outcome.result == "exact" for outcome in transient)
    return "\n".join(
        [
            f"{len(outcomes)} schedules, {sum(outcome.faults for outcome in outcomes)} faults injected, "
            f"{sum(outcome.kills for outcome in outcomes)} workers killed or stopped, "
            f"slowest {max((outcome.seconds for outcome in outcomes), default=0):.1f} s",
            "outcomes: " + ", ".join(f"{name} {count}" for name, count in results.most_common()),
            f"of {len(transient)} schedules whose faults pass, {exact} were exact",
        ]
    )


def main() -> int:
    """Run until the time is up, or the promise is broken."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=3600, help="how long (default: an hour)")
    parser.add_argument("--seed", type=int, default=None, help="first seed (default: by chance)")
    parser.add_argument("--schedules", type=int, default=160, help="schedules per seed (default: 160)")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
    outcomes: list[Outcome] = []
    ends = time.monotonic() + options.seconds
    while time.monotonic() < ends:
        try:
            outcomes += run_storm(seed, options.schedules)
        except StormFailure as failure:
            print(f"{summary(outcomes)}\nFAILED: {failure}", file=sys.stderr)
            return 1
        print(f"seed {seed}: well. So far {summary(outcomes)}\n", flush=True)
        seed += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
