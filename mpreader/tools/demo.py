"""The whole way of a checkpoint: written to an embedded S3, loaded back, compared bit by bit, and timed.

S3 is played by a process of the same machine, so the seconds compare ways of loading; they are not those of a load
from AWS. No network and no credentials are needed.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ConfigError, PoolConfig, S3ReaderConstructor
from mpreader.host import Host
from mpreader.testing.s3_server import REGION, S3Server
from mpreader.tools.bench.memory import TreeMemory

__all__ = ["DemoLoad", "differing", "make_state", "run_demo"]

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
class DemoLoad:
    """One load of the checkpoint, and how it went.

    Attributes:
        way: What it was loaded with, and whether it was the first time.
        nbytes: Bytes of all tensors together.
        seconds: How long it took.
        extra_memory_bytes: What this process and its workers took besides the checkpoint, at most; shared memory is
            counted once.
        differing: Names of what was not the same to the bit.
    """

    way: str
    nbytes: int
    seconds: float
    extra_memory_bytes: int
    differing: list[str]

    @property
    def gb_per_s(self) -> float:
        """Gigabytes (1e9 bytes) per second."""
        return self.nbytes / self.seconds / 1e9


def run_demo(
    size_mb: int,
    pool_config: PoolConfig | None = None,
    *,
    every_reader: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> list[DemoLoad]:
    """Write a checkpoint to an embedded S3 and load it back in each way that is installed, twice.

    Args:
        size_mb: Size of the checkpoint in megabytes (1e6 bytes), at least 1.
        pool_config: Settings of the worker pool. None: the defaults.
        every_reader: Load with the other kinds of readers, too.
        say: Is called with a line for people before and after each step.

    Returns:
        The loads, in the order in which they were made.

    Raises:
        ConfigError: The checkpoint would not fit into this machine's memory.
    """
    _check_memory(size_mb)
    with warnings.catch_warnings(), ExitStack() as stack:
        # One process is what this demo is about; torch warns all the same.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        say("Starting an embedded S3 server …")
        server = stack.enter_context(S3Server())
        stack.enter_context(_environment(server.environment()))
        server.create_bucket(BUCKET)
        ways = _ways(pool_config or PoolConfig(), every_reader=every_reader)
        state = make_state(size_mb)
        tensors = [tensor for part in ("model", "odd") for tensor in state[part].values()]
        size = sum(tensor.nbytes for tensor in tensors)
        say(f"Writing {size / _MB:.0f} MB, {len(tensors)} tensors, to {CHECKPOINT} at {server.endpoint_url} …")
        say(f"  written in {_save(state):.1f} s")
        loads = []
        for way, open_reader in ways.items():
            say(f"Loading it with {way} …")
            with open_reader() as reader:
                for load_name in _LOADS:
                    loads.append(_load(state, f"{way}, {load_name}", size, reader, server.pid))
                    say(f"  loaded in {loads[-1].seconds:.2f} s; {_verdict(loads[-1])}")
        if not _has_connector():
            say("(s3torchconnector[dcp] is not installed, so it is not compared)")
        return loads


def _check_memory(size_mb: int) -> None:
    needed = 2 * size_mb * _MB  # what is saved, and what it is loaded into
    free = Host.now().free_memory
    if needed > free:
        raise ConfigError(f"{size_mb} MB need {needed / _MB:.0f} MB of memory, {free / _MB:.0f} MB are free")


def _verdict(done: DemoLoad) -> str:
    return f"DIFFERS: {', '.join(done.differing)}" if done.differing else "every bit is right"


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


def _save(state: dict[str, Any]) -> float:
    from mpreader.dcp import S3StorageWriter

    started = time.perf_counter()
    save(state, storage_writer=S3StorageWriter(REGION, CHECKPOINT, thread_count=4), no_dist=True)
    return time.perf_counter() - started


def _ways(pool_config: PoolConfig, *, every_reader: bool) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """The ways of loading that are installed: what opens a storage reader, by name."""
    from mpreader.dcp import S3StorageReader

    def own(constructor: Any) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: S3StorageReader(REGION, CHECKPOINT, reader_constructor=constructor)

    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "mpreader": lambda: S3StorageReader(REGION, CHECKPOINT, pool_config=pool_config)
    }
    if every_reader:
        ways["mpreader with sequential()"] = own(S3ReaderConstructor.sequential())
        ways["mpreader with range_based()"] = own(S3ReaderConstructor.range_based())
        ways["mpreader with dcp_optimized()"] = own(S3ReaderConstructor.dcp_optimized())
    if _has_connector():
        ways["s3torchconnector with multiprocess()"] = lambda: _connector(pool_config)
        ways["s3torchconnector by default"] = lambda: _connector(None)
    return ways


def _has_connector() -> bool:
    try:
        import s3torchconnector.dcp  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _connector(pool_config: PoolConfig | None) -> Iterator[Any]:
    """s3torchconnector's storage reader, with mpreader dropped in where there is a ``pool_config``."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader as ConnectorReader

    config = S3ClientConfig(force_path_style=True)
    if pool_config is None:
        yield ConnectorReader(REGION, CHECKPOINT, config)
        return
    with closing(S3ReaderConstructor.multiprocess(pool_config=pool_config)) as constructor:
        drop_in: Any = constructor
        yield ConnectorReader(REGION, CHECKPOINT, config, reader_constructor=drop_in)


def _load(state: dict[str, Any], way: str, size: int, reader: Any, server_pid: int) -> DemoLoad:
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
    return DemoLoad(way, size, seconds, memory.peak_extra_bytes, differing(state, target))


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
