"""Random reads of the storm: objects, ranges, and ways to read them; each read is compared with the right bytes.

:mod:`scripts.faults.storm` carries the plans out. A plan checks bytes; errors are judged by the storm.
"""

from __future__ import annotations

import random
import secrets
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpreader import PoolConfig, RangeFetcher, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.testing.fault_server import FaultServer

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "Setup", "StormFailure", "Versions", "choose_plan", "make_checkpoint"]

Range = tuple[int, int]


class StormFailure(AssertionError):
    """A read broke the promise of :mod:`scripts.faults.storm`; the message describes the breach and names the seed."""


@dataclass(frozen=True)
class Setup:
    """A server, and clients of it; used for several schedules, so that pools are warm in most of them.

    Attributes:
        server: The server that injects the faults.
        client_config: Settings for S3 clients of the server.
        pool_config: Settings of all pools.
        fetcher: Fetcher with these settings, and its own pool.
        checkpoint: Tensors of the checkpoint at ``s3://storm/checkpoint``; empty: there is none.
    """

    server: FaultServer
    client_config: S3ClientConfig
    pool_config: PoolConfig
    fetcher: RangeFetcher
    checkpoint: Mapping[str, torch.Tensor]


class Versions:
    """The versions of one object, the newest one last.

    Attributes:
        path: Path of the object on the server.
        size: Size of each version.
        contents: Bytes of each version.
        validators: Headers by which the server tells the versions apart: its usual ones, a weak ETag, no more than
            Last-Modified, or no more than a number of its own.
    """

    def __init__(self, rng: random.Random) -> None:
        self.path = f"/storm/{secrets.token_hex(8)}"
        self.size = rng.choice((1, rng.randrange(1, 64 * KiB), rng.randrange(1, MiB)))
        self.contents = [rng.randbytes(self.size)]
        self.validators = rng.choice(("usual", "weak ETag", "Last-Modified", "number"))

    def headers(self, content: bytes) -> dict[str, str]:
        """Headers of a version, for :meth:`mpreader.testing.FaultServer.put`."""
        number = f"{zlib.crc32(content):08x}"
        return {
            "usual": {},
            "weak ETag": {"ETag": f'W/"{number}"', "Last-Modified": ""},
            "Last-Modified": {"ETag": ""},
            "number": {"ETag": "", "Last-Modified": "", "X-Goog-Generation": number},
        }[self.validators]

    def require(self, pieces: Sequence[tuple[int, int, bytes]]) -> None:
        """Check that pieces ``(start, end, bytes)`` are all right, and of one and the same version.

        Raises:
            StormFailure: They are not.
        """
        # For one version all pieces must fit: pieces that are right, but of two versions, are a breach.
        if not any(all(content[start:end] == got for start, end, got in pieces) for content in self.contents):
            raise StormFailure(f"wrong bytes of {self.path}, or of two versions")


@dataclass(frozen=True)
class Plan:
    """One read.

    Attributes:
        name: Method of the fetcher that reads, or ``"load"``.
        read: Function that reads and checks the bytes; raises ``StormFailure`` if they are wrong.
        objects: The objects that are read; empty for a load.
    """

    name: str
    read: Callable[[], None]
    objects: list[Versions]


def choose_plan(setup: Setup, rng: random.Random) -> Plan:
    """Choose a way to read, and the objects and ranges that it reads."""
    reads = {"fetch": _fetch, "stream": _stream, "fetch_object": _fetch_object, "fetch_many": _fetch_many}
    # A setup with a checkpoint reads it as often as all else together.
    name = rng.choice((*reads, *(["load"] * 4 if setup.checkpoint else [])))
    if name == "load":
        return Plan(name, lambda: _load(setup), [])
    objects = [Versions(rng) for _ in range(3 if name == "fetch_many" else 1)]
    ranges = [_choose_ranges(rng, versions.size) for versions in objects]
    gap = rng.choice((0, 1000, MiB))
    return Plan(name, lambda: reads[name](setup, objects, ranges, gap), objects)


def _choose_ranges(rng: random.Random, size: int) -> list[Range]:
    """Choose ranges in random order: overlapping, some empty, one of them repeated."""
    ranges = []
    for _ in range(rng.choice((1, 5, 40))):
        start, end = sorted(rng.choices(range(size + 1), k=2))  # size + 1: an end is exclusive
        ranges.append((start, rng.choice((end, end, min(size, start + 100), start))))
    return ranges + ranges[:1]


def _fetch(setup: Setup, objects: list[Versions], ranges_of: list[list[Range]], gap: int) -> None:
    [versions], [ranges] = objects, ranges_of
    views = setup.fetcher.fetch(setup.server.url(versions.path), ranges, max_gap_size=gap)
    versions.require([(start, end, bytes(view)) for (start, end), view in zip(ranges, views, strict=True)])


def _stream(setup: Setup, objects: list[Versions], ranges_of: list[list[Range]], gap: int) -> None:
    [versions], [ranges] = objects, ranges_of
    stream = setup.fetcher.stream(setup.server.url(versions.path), ranges, max_gap_size=gap)
    pieces = [(*ranges[index], bytes(view)) for index, view in stream]
    # require() compares the pieces that came, and would not miss one that did not.
    if len(pieces) != len(ranges):
        raise StormFailure(f"{len(pieces)} of {len(ranges)} ranges came")
    versions.require(pieces)


def _fetch_object(setup: Setup, objects: list[Versions], _: list[list[Range]], __: int) -> None:
    [versions] = objects
    # By its s3:// URI, not by its URL, so that signed requests meet faults, too. The path begins with the second slash.
    versions.require([(0, versions.size, bytes(setup.fetcher.fetch_object(f"s3:/{versions.path}")))])


def _fetch_many(setup: Setup, objects: list[Versions], ranges_of: list[list[Range]], gap: int) -> None:
    wanted = {setup.server.url(versions.path): ranges for versions, ranges in zip(objects, ranges_of, strict=True)}
    found = setup.fetcher.fetch_many(wanted, max_gap_size=gap)
    for versions, (url, ranges) in zip(objects, wanted.items(), strict=True):
        versions.require([(start, end, bytes(view)) for (start, end), view in zip(ranges, found[url], strict=True)])


def _load(setup: Setup) -> None:
    import torch
    from torch.distributed.checkpoint.state_dict_loader import load

    from mpreader.dcp import S3StorageReader

    # New tensors each time, so that nothing is right since a load before was.
    state = {name: torch.zeros_like(tensor) for name, tensor in setup.checkpoint.items()}
    with S3StorageReader(None, "s3://storm/checkpoint", setup.client_config, pool_config=setup.pool_config) as reader:
        load(dict(state), storage_reader=reader, no_dist=True)
    for name, tensor in setup.checkpoint.items():
        if not torch.equal(state[name], tensor):
            raise StormFailure(f"{name} is wrong after a load")


def make_checkpoint() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """Make the files of a checkpoint, by their paths on the server, and the tensors that they hold."""
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
