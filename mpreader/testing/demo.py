"""The whole way of a checkpoint: written to an embedded S3, loaded back, compared bit by bit, and timed.

``python -m mpreader.testing.demo`` needs no network and no credentials. Its exit status is 1 if any byte came back
different. S3 is played by a process of the same machine, so the seconds compare ways of
loading; they are not those of a load from AWS.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ConfigError, PoolConfig, S3ReaderConstructor
from mpreader.config import parse_bytes
from mpreader.testing.memory import TreeMemory
from mpreader.testing.s3_server import REGION, S3Server

__all__ = ["differing", "main", "make_state"]

BUCKET: Final = "demo-bucket"
CHECKPOINT: Final = f"s3://{BUCKET}/checkpoint"
_LOADS: Final = ("first load", "again")  # the first one also pays for starting processes and warming memory
_MB: Final = 1_000_000
_ODD_TENSORS: Final = {
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 7),
    "mask": torch.arange(1001) % 3 == 0,
    "ids": torch.arange(-500, 500),
    "complex": torch.complex(torch.linspace(0, 1, 99), torch.linspace(1, 0, 99)),
    "transposed": torch.arange(6000, dtype=torch.float32).reshape(60, 100).t(),
    "not_a_number": torch.tensor([float("nan"), float("inf"), -0.0]),
}
_ITEMS: Final = {"step": 12_000, "lr": 3e-4, "name": "demo", "betas": [0.9, 0.95], "schedule": ("cosine", 100)}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a way of loading, and how it went."""

    way: str
    seconds: float
    extra_memory: int
    differing: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mpreader.testing.demo", description=__doc__)
    parser.add_argument("--size-mb", type=int, default=400, help="size of the checkpoint in MB (default: 400)")
    parser.add_argument("--max-memory", type=_bytes, help="shared memory of the pool, such as 64MiB")
    parser.add_argument("--workers", type=int, help="worker processes of the pool")
    parser.add_argument("--every-reader", action="store_true", help="load with the other kinds of readers, too")
    options = parser.parse_args(arguments)
    if options.size_mb < 1:
        parser.error("--size-mb must be at least 1")
    try:
        pool_config = PoolConfig(workers=options.workers, max_memory=options.max_memory)
    except ConfigError as error:
        parser.error(str(error))
    # One process is what this demo is about; torch warns all the same.
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    print("Starting an embedded S3 server …", flush=True)
    with S3Server() as server, _environment(server.environment()):
        server.create_bucket(BUCKET)
        return _run(server, options.size_mb, lambda: _ways(pool_config, every_reader=options.every_reader))


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_state(size_mb: int) -> dict[str, Any]:
    """What a training run would save: about ``size_mb`` MB of bf16 weights, odd tensors and non-tensor items."""
    width = 1024 if size_mb >= 100 else 128
    layer: dict[str, tuple[int, ...]] = {
        "q": (width, width),
        "k": (width, width),
        "v": (width, width),
        "o": (width, width),
    }
    layer |= {"up": (4 * width, width), "down": (width, 4 * width), "norm": (width,)}
    layer_bytes = sum(2 * torch.Size(shape).numel() for shape in layer.values())
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{number}.{name}.weight": _random_bits(shape, generator)
        for number in range(max(1, size_mb * _MB // layer_bytes))
        for name, shape in layer.items()
    }
    return {"model": weights, "odd": dict(_ODD_TENSORS), "items": dict(_ITEMS)}


def _random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # All bit patterns, NaNs too: what is compared are bits, not numbers.
    return torch.empty(shape, dtype=torch.int16).random_(-(1 << 15), 1 << 15, generator=generator).view(torch.bfloat16)


def _run(server: S3Server, size_mb: int, ways: Callable[[], Iterator[tuple[str, Any]]]) -> int:
    state = make_state(size_mb)
    tensors = [tensor for part in ("model", "odd") for tensor in state[part].values()]
    size = sum(tensor.nbytes for tensor in tensors)
    print(
        f"Writing {size / _MB:.0f} MB, {len(tensors)} tensors, to {CHECKPOINT} at {server.endpoint_url} …", flush=True
    )
    started = time.perf_counter()
    _save(state)
    print(f"  written in {time.perf_counter() - started:.1f} s")
    rows = []
    for way, reader in ways():
        print(f"Loading it with {way} …", flush=True)
        for load_name in _LOADS:
            rows.append(_load(state, f"{way}, {load_name}", reader, server.pid))
            verdict = f"DIFFERS: {', '.join(rows[-1].differing)}" if rows[-1].differing else "every bit is right"
            print(f"  loaded in {rows[-1].seconds:.2f} s; {verdict}", flush=True)
    _print_table(rows, size)
    return 1 if any(row.differing for row in rows) else 0


def _save(state: dict[str, Any]) -> None:
    from mpreader.dcp import S3StorageWriter

    writer = S3StorageWriter(REGION, CHECKPOINT, thread_count=4)
    save(state, storage_writer=writer, no_dist=True)


def _ways(pool_config: PoolConfig, *, every_reader: bool) -> Iterator[tuple[str, Any]]:
    """Names of the ways of loading that are installed, and their storage readers."""
    from mpreader.dcp import S3StorageReader

    with S3StorageReader(REGION, CHECKPOINT, pool_config=pool_config) as reader:
        yield "mpreader", reader
    if every_reader:
        others = {
            "sequential()": S3ReaderConstructor.sequential(),
            "range_based()": S3ReaderConstructor.range_based(),
            "dcp_optimized()": S3ReaderConstructor.dcp_optimized(),
        }
        for name, other in others.items():
            with S3StorageReader(REGION, CHECKPOINT, reader_constructor=other) as reader:
                yield f"mpreader with {name}", reader
    try:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader as ConnectorReader
    except ImportError:
        print("(s3torchconnector[dcp] is not installed, so it is not compared)")
        return
    config = S3ClientConfig(force_path_style=True)
    with closing(S3ReaderConstructor.multiprocess(pool_config=pool_config)) as constructor:
        drop_in: Any = constructor
        yield (
            "s3torchconnector with multiprocess()",
            ConnectorReader(REGION, CHECKPOINT, config, reader_constructor=drop_in),
        )
    yield "s3torchconnector by default", ConnectorReader(REGION, CHECKPOINT, config)


def _load(state: dict[str, Any], way: str, reader: Any, server_pid: int) -> Row:
    # Filled, so that the memory of the targets is there before the clock starts, and nothing is right by chance.
    target = {
        part: {name: torch.full_like(tensor, 1) for name, tensor in state[part].items()} for part in ("model", "odd")
    }
    target["items"] = {name: type(value)() for name, value in state["items"].items()}
    gc.collect()  # or what the load before left would be freed in this one
    with TreeMemory(excluded_pids=[server_pid]) as memory:
        started = time.perf_counter()
        load(target, storage_reader=reader, no_dist=True)
        seconds = time.perf_counter() - started
    return Row(way, seconds, memory.peak_extra_bytes, differing(state, target))


def differing(state: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """Names of what is not the same, to the bit."""
    names = []
    for part in ("model", "odd"):
        for name, tensor in state[part].items():
            if not _same_bits(tensor, loaded[part][name]):
                names.append(f"{part}.{name}")
    return names + [f"items.{name}" for name, value in state["items"].items() if loaded["items"][name] != value]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _print_table(rows: list[Row], size: int) -> None:
    width = max(len(row.way) for row in rows)
    print(f"\n{'loaded with':{width}}  seconds    GB/s  extra memory  bits")
    for row in rows:
        memory = f"{row.extra_memory / _MB:.0f} MB"
        verdict = "DIFFER" if row.differing else "same"
        print(f"{row.way:{width}}  {row.seconds:7.2f}  {size / row.seconds / 1e9:6.2f}  {memory:>12}  {verdict}")
    print("(extra memory: what this process and its workers took besides the checkpoint; shared memory counted once)")


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set ``variables``, and no other AWS_* and no proxy, until the block ends."""
    before = dict(os.environ)
    for name in before:
        # s3torchconnector would go through a proxy even to this machine.
        if name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
