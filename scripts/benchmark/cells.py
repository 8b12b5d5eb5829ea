"""Cells of the benchmark: workloads, servers, contenders, and the combinations that a run measures by default.

The names here are those of the command line and of the results. This module measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

__all__ = [
    "CONTENDERS",
    "FETCHES",
    "LOADS",
    "SERVERS",
    "TENSORS",
    "TITLES",
    "WORKLOADS",
    "Cell",
    "choose",
    "default_cells",
]

LOADS: Final = {
    "a": "load of 1.2 GB, 109 bf16 tensors of a transformer, 4 files",
    "b": "load of 10,000 tensors of 16 KiB, 1 file",
    "c": "load of every other tensor of (a)",
    "d": "load of one tensor of 2 GB",
}
FETCHES: Final = {
    "e": "fetch of 4 whole objects, 1.2 GB, all kept",
    "f": "fetch of 4 whole objects, 1.2 GB, streamed and let go",
    "g": "fetch of 5,000 ranges of 64 KiB scattered over 1.2 GB",
}
WORKLOADS: Final = LOADS | FETCHES
# Of safetensors files, for scripts/bench safetensors.
TENSORS: Final = {
    "whole": "1.26 GB, 150 tensors, 3 files",
    "streamed": "1.26 GB, each tensor let go",
    "half": "half the tensors of the 1.26 GB, by name",
    "rows": "a quarter of the rows of all of them",
    "many": "10,000 tensors of 16 KiB, 1 file",
}
SERVERS: Final = {
    "plain": "http",
    "tls": "https",
    "slow90": "http, 90 MB/s per connection",
    "late30": "http, 30 ms before the first byte",
}
TITLES: Final = {
    "mpreader": "mpreader",
    "alone": "mpreader, share_host=False",
    "drop-in": "mpreader drop-in",
    "dcp_optimized": "s3torchconnector",
    "sequential": "s3torchconnector sequential",
    "range_based": "s3torchconnector range_based",
    "local": "torch FileSystemReader (local)",
    "s3fs": "s3fs",
    "obstore": "obstore",
    "s3torchconnector": "s3torchconnector",
    "boto3": "boto3",
    "floor": "bare sockets",
    "floor-private": "bare sockets, private memory",
    "runai": "Run:ai",
    "runai-clone": "Run:ai, cloned",
}
_LOADERS: Final = ("mpreader", "drop-in", "dcp_optimized", "sequential", "range_based", "local", "s3fs")
_MAIN_LOADERS: Final = ("mpreader", "drop-in", "dcp_optimized")
_TWO: Final = ("mpreader", "dcp_optimized")  # the two that are compared on the slower servers
_FETCHERS: Final = ("mpreader", "obstore", "s3torchconnector", "boto3", "s3fs", "floor")
# Measured once: "local" reads files, from no server, and the lower bound ("floor") is the same for all servers.
_PLAIN_ONLY: Final = ("local", "floor")
CONTENDERS: Final = tuple(dict.fromkeys(_LOADERS + _FETCHERS))


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    Attributes:
        workload: Key of ``WORKLOADS``.
        server: Key of ``SERVERS``.
        targets: ``"touched"``, ``"fresh"`` (memory that was never touched), or ``"-"`` for fetches.
        contender: One of ``CONTENDERS``.
    """

    workload: str
    server: str
    targets: str
    contender: str

    @property
    def group(self) -> tuple[str, str, str]:
        """Workload, server and targets: cells that are compared with each other differ only in their contender."""
        return self.workload, self.server, self.targets

    def __str__(self) -> str:
        return " ".join(part for part in (self.workload, self.server, self.targets, self.contender) if part != "-")


def _product(
    workloads: Iterable[str], servers: Iterable[str], targets: Iterable[str], contenders: Iterable[str]
) -> Iterator[Cell]:
    for workload in workloads:
        for server in servers:
            for target in targets:
                for contender in contenders:
                    if server == "plain" or contender not in _PLAIN_ONLY:
                        yield Cell(workload, server, target, contender)


def _all_cells() -> Iterator[Cell]:
    """Every combination; they take hours."""
    yield from _product(LOADS, SERVERS, ("touched", "fresh"), _LOADERS)
    yield from _product(FETCHES, SERVERS, ("-",), _FETCHERS)


def default_cells() -> Iterator[Cell]:
    """The cells that fit into half an hour on 2 cores."""
    yield from _product("a", ["plain"], ("touched",), _LOADERS)
    yield from _product("a", ["plain"], ("fresh",), ("mpreader", "dcp_optimized", "local"))
    yield from _product("bcd", ["plain"], ("touched",), ("mpreader", "dcp_optimized", "local"))
    yield from _product(FETCHES, ["plain"], ("-",), _FETCHERS)
    yield from _product("a", [server for server in SERVERS if server != "plain"], ("touched",), _TWO)


def _quick_cells() -> Iterator[Cell]:
    """The cells that fit into two minutes, in one round."""
    yield from _product("ab", ["plain"], ("touched",), (*_MAIN_LOADERS, "local"))
    yield from _product("f", ["plain"], ("-",), ("mpreader", "obstore", "floor"))


def _place(cell: Cell) -> tuple[int, int, bool]:
    # The contender is no part of the key: sorting is stable, so contenders keep their order.
    return list(WORKLOADS).index(cell.workload), list(SERVERS).index(cell.server), cell.targets == "fresh"


def choose(
    *,
    quick: bool = False,
    everything: bool = False,
    workloads: Iterable[str] = (),
    servers: Iterable[str] = (),
    contenders: Iterable[str] = (),
) -> list[Cell]:
    """Choose the cells of a run; those of the same group are side by side.

    Args:
        quick: Take a few cells, unless others are selected below.
        everything: Choose from every combination, not only from those that fit into half an hour.
        workloads: Workloads to take; empty: all.
        servers: Servers to take; empty: all.
        contenders: Contenders to take; empty: all.
    """
    wanted = set(workloads) or set(WORKLOADS)
    if everything:
        cells = _all_cells()
    elif quick and not (workloads or servers or contenders):
        cells = _quick_cells()
    else:
        cells = default_cells()
    return [
        cell
        for cell in sorted(cells, key=_place)
        if cell.workload in wanted
        and (not servers or cell.server in set(servers))
        and (not contenders or cell.contender in set(contenders))
    ]
