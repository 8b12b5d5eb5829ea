"""Demo: a checkpoint is written to an embedded S3, loaded back with several readers, compared bit by bit, and timed.

:func:`run_demo` is responsible for the whole run and returns the measurements; ``mpreader demo`` prints them. No other
module of the package may import :mod:`mpreader.testing`. The S3 server is a process of the same machine, so the seconds
compare readers with each other; they are not those of a load from AWS. No network and no credentials are needed.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mpreader import ConfigError, PoolConfig, S3ReaderConstructor
from mpreader.dcp import S3StorageReader, S3StorageWriter
from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.sample import State, blank_copy, differing, load_state, make_state, save_state, tensor_sizes
from mpreader.host import Host
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.testing.s3_server import REGION, S3Server
from mpreader.tools.bench.memory import TreeMemory
from mpreader.tools.ranks.job import HostLoad, time_rank_loads

__all__ = ["Demo", "DemoLoad", "run_demo"]

BUCKET: Final = "demo-bucket"
CHECKPOINT: Final = f"s3://{BUCKET}/checkpoint"
_LOADS: Final = ("first load", "again")  # the first one also pays for starting processes and warming memory
_MB: Final = 1_000_000

RANKS: Final = 2

OpenReader = Callable[[], AbstractContextManager[Any]]
"""Opens a storage reader of the checkpoint for the time of a block."""


@dataclass(frozen=True, slots=True)
class DemoLoad:
    """One load of the checkpoint, with its measurements.

    Attributes:
        way: Name of the reader, and ``"first load"`` or ``"again"``.
        nbytes: Bytes of all tensors together.
        seconds: Time that the load took.
        extra_memory_bytes: Most memory that this process and its workers took besides the checkpoint; shared memory is
            counted once.
        differing: Names of tensors and items that came back different; empty if every bit was right.
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


class Demo(NamedTuple):
    """Measurements of the demo.

    Attributes:
        loads: Loads by one process, in the order in which they were made.
        ranks: Load by the ranks of a job on this host.
    """

    loads: list[DemoLoad]
    ranks: HostLoad


def run_demo(
    size_mb: int,
    pool_config: PoolConfig | None = None,
    *,
    every_reader: bool = False,
    report: Callable[[str], object] = lambda _: None,
) -> Demo:
    """Write a checkpoint to an embedded S3, and load it back twice with each reader that is installed, and with ranks.

    Args:
        size_mb: Size of the checkpoint in megabytes (1e6 bytes), at least 1.
        pool_config: Settings of the worker pool. None: the defaults.
        every_reader: Load with mpreader's other kinds of readers, too.
        report: Is called with a line for people before and after each step.

    Returns:
        The loads, and that of the ranks.

    Raises:
        ConfigError: The checkpoint would not fit into this machine's memory.
    """
    _check_memory(size_mb)
    with warnings.catch_warnings(), ExitStack() as stack:
        # torch warns where no process group was set up; the demo loads in one process on purpose.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        report("Starting an embedded S3 server …")
        server = stack.enter_context(S3Server())
        # The environment, not an S3ClientConfig, leads every reader to the server, s3torchconnector's included.
        stack.enter_context(_environment(server.environment()))
        server.create_bucket(BUCKET)
        state = make_state(size_mb)
        sizes = tensor_sizes(state)
        report(f"Writing {sum(sizes) / _MB:.0f} MB, {len(sizes)} tensors, to {CHECKPOINT} at {server.endpoint_url} …")
        report(f"  written in {_save(state):.1f} s")
        loads = []
        for name, open_reader in _readers(pool_config or PoolConfig(), every_reader=every_reader).items():
            report(f"Loading it with {name} …")
            # One reader object for both loads: the second one finds its workers started and its memory warm.
            with open_reader() as reader:
                for load_name in _LOADS:
                    loads.append(_load(state, f"{name}, {load_name}", sum(sizes), reader, server.pid))
                    report(f"  loaded in {loads[-1].seconds:.2f} s; {_verdict(loads[-1])}")
        if not _has_connector():
            report("(s3torchconnector[dcp] is not installed, so it is not compared)")
        report(f"Loading it with {RANKS} ranks, as a job of this host does …")
        ranks = _load_with_ranks(pool_config or PoolConfig())
        report(f"  loaded in {ranks.seconds:.2f} s")
        return Demo(loads, ranks)


def _check_memory(size_mb: int) -> None:
    needed = (1 + RANKS) * size_mb * _MB  # what is saved, and what each rank loads it into
    free = Host.now().free_memory
    if needed > free:
        raise ConfigError(f"{size_mb} MB need {needed / _MB:.0f} MB of memory, {free / _MB:.0f} MB are free")


def _verdict(load: DemoLoad) -> str:
    return f"DIFFERS: {', '.join(load.differing)}" if load.differing else "every bit is right"


def _save(state: State) -> float:
    """Save the state to the server; the seconds that it took."""
    started = time.perf_counter()
    save_state(state, S3StorageWriter(REGION, CHECKPOINT, thread_count=4))
    return time.perf_counter() - started


def _load(state: State, name: str, nbytes: int, reader: Any, server_pid: int) -> DemoLoad:
    target = blank_copy(state)
    gc.collect()  # garbage of the previous load, freed within this one, would hide memory that this one takes
    # The server is a child of this process, and so counted unless it is excluded; it is no part of a load.
    with TreeMemory(excluded_pids=[server_pid]) as memory:
        started = time.perf_counter()
        load_state(target, reader)
        seconds = time.perf_counter() - started
    return DemoLoad(name, nbytes, seconds, memory.peak_extra_bytes, differing(state, target))


def _load_with_ranks(pool_config: PoolConfig) -> HostLoad:
    """Load everything in each rank of a job, the worst case for a host that does not share."""
    options = LoadOptions(
        region=REGION,
        s3client_config=None,
        pool_config=pool_config,
        max_gap_size=DEFAULT_MAX_GAP_SIZE,
        match=None,
        verify=True,
        weights_only=True,
        allowed_globals=(),
        progress=False,
    )
    [load] = time_rank_loads(CHECKPOINT, options, RANKS, dim=None)
    return load


def _readers(pool_config: PoolConfig, *, every_reader: bool) -> dict[str, OpenReader]:
    """The readers that are installed, by the names that the demo shows."""

    def own(constructor: Any) -> OpenReader:
        return lambda: S3StorageReader(REGION, CHECKPOINT, reader_constructor=constructor)

    readers: dict[str, OpenReader] = {"mpreader": lambda: S3StorageReader(REGION, CHECKPOINT, pool_config=pool_config)}
    if every_reader:
        readers["mpreader with sequential()"] = own(S3ReaderConstructor.sequential())
        readers["mpreader with range_based()"] = own(S3ReaderConstructor.range_based())
        readers["mpreader with dcp_optimized()"] = own(S3ReaderConstructor.dcp_optimized())
    if _has_connector():
        readers["s3torchconnector with multiprocess()"] = lambda: _connector(pool_config)
        readers["s3torchconnector by default"] = lambda: _connector(None)
    return readers


def _has_connector() -> bool:
    try:
        import s3torchconnector.dcp  # noqa: F401  # imported to find out if it, with its extra "dcp", is installed
    except ImportError:
        return False
    return True


@contextmanager
def _connector(pool_config: PoolConfig | None) -> Iterator[Any]:
    """s3torchconnector's storage reader, with mpreader's readers dropped in if there is a ``pool_config``."""
    # Imported here, since the package is optional.
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageReader as ConnectorReader

    # By default the bucket is a subdomain of the endpoint's host, and 127.0.0.1 has none.
    config = S3ClientConfig(force_path_style=True)
    if pool_config is None:
        yield ConnectorReader(REGION, CHECKPOINT, config)
        return
    # The constructor owns the worker pool, and s3torchconnector does not close it.
    with closing(S3ReaderConstructor.multiprocess(pool_config=pool_config)) as constructor:
        drop_in: Any = constructor  # the parameter is annotated with a type of s3torchconnector's
        yield ConnectorReader(REGION, CHECKPOINT, config, reader_constructor=drop_in)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set ``variables`` until the block ends, and remove all other ``AWS_*`` variables and the proxies."""
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
