"""Messages between a job and its ranks, and the error of a rank that fails in a way of its own.

::

    job                          rank
     ── JobSettings ─────────────>
     <───────────────── Ready ───   targets are made, all ranks have joined
     ── Go ──────────────────────>
     <──────────────── Loaded ───   for each load; Failed in place of any answer
     ── Stop ────────────────────>   it leaves its pool, and ends
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mpreader.errors import MpreaderError
from mpreader.tools.bench.counts import LoadCounts

if TYPE_CHECKING:
    from mpreader.dcp.checkpoint import LoadOptions
    from mpreader.dcp.job import Described
    from mpreader.telemetry.events import RequestEvent

__all__ = ["Failed", "Go", "JobSettings", "Loaded", "RankFailed", "RankLoad", "Ready", "Stop"]


class RankFailed(MpreaderError):
    """A rank has ended, or has failed with an error that is none of mpreader's.

    Attributes:
        rank: The rank.
    """

    def __init__(self, message: str, *, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class JobSettings(NamedTuple):
    """Settings of the job: all that a rank must know to load.

    Attributes:
        uri: URI of the checkpoint.
        options: Options of each load.
        described: What the checkpoint holds.
        dim: Dimension in which tensors are divided; None: each rank loads all of them.
        port: Port of 127.0.0.1 on which the ranks find each other.
        is_recorded: True: the requests are recorded.
        log_level: Level of the lines that each rank logs on stderr; 0: none.
    """

    uri: str
    options: LoadOptions
    described: Described
    dim: int | None
    port: int
    is_recorded: bool
    log_level: int


class Ready(NamedTuple):
    """A rank can begin to load."""


class Go(NamedTuple):
    """The ranks shall load."""


class Stop(NamedTuple):
    """The ranks shall end."""


@dataclass(frozen=True, slots=True)
class RankLoad(LoadCounts):
    """Measurements of one load by one rank.

    Attributes:
        rank: The rank.
        seconds: Wall time, from the moment when all ranks had begun.
        nbytes: Bytes of the rank's tensors in memory.
        shared_nbytes: Bytes that it got from the rank that received them.
    """

    rank: int
    seconds: float
    nbytes: int
    shared_nbytes: int


class Loaded(NamedTuple):
    """A rank has loaded.

    Attributes:
        load: Its measurements.
        recorded: Its requests, for a timeline; none if they are not recorded.
    """

    load: RankLoad
    recorded: tuple[tuple[int, RequestEvent], ...]


class Failed(NamedTuple):
    """A rank has failed, and ends."""

    error: MpreaderError
