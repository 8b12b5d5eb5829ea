"""Ranks: processes that load as the ranks of one host do, one load after the other, and to which anything may happen.

They stand in for the ranks of a job whose collectives would hang or fail when a rank dies, so that the sharing alone is
tested: the process that made them hands their offers round, as DCP's planning does. All are forked from one process
that has imported torch, since that takes longer than most loads::

    Nursery ── fork ──► Rank: offer() ──► share_out() ──► load() ──► outcome() ──► close()

A rank loads boxes of the tensors of :func:`make_tensors`, and judges itself what it has got.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import PoolConfig, S3ClientConfig
from mpreader.dcp.sharing import group_plans

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "DATA_PATHS",
    "Box",
    "Job",
    "Mishap",
    "Nursery",
    "Outcome",
    "Place",
    "Rank",
    "Work",
    "make_files",
    "make_tensors",
    "share_out",
]

URI: Final = "s3://ranks/checkpoint"
ROWS, COLUMNS = 64, 256
_TENSORS: Final = 144
_FILES: Final = 3
DATA_PATHS: Final = tuple(f"{URI.removeprefix('s3:/')}/__0_{number}.distcp" for number in range(_FILES))
_STARTED_WITHIN_S: Final = 120.0  # torch is imported, on a busy machine
_ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1", "AWS_ACCESS_KEY_ID": "ranks", "AWS_SECRET_ACCESS_KEY": "secret"}
_POLL_S: Final = 0.01
_ROOT: Final = Path(__file__).resolve().parents[2]


class Box(NamedTuple):
    """A box of a stored tensor.

    Attributes:
        name: Name of the tensor.
        offsets: First row and column.
        sizes: Numbers of rows and columns.
    """

    name: str
    offsets: tuple[int, int]
    sizes: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Mishap:
    """What happens to a rank in the middle of its load, by its planner.

    Attributes:
        call: Method of the planner in which it happens; ``"read"``: before the rank begins to read.
        number: In which call of that method, from 1.
        kind: ``"kill"`` and ``"stop"`` are signals, ``"interrupt"`` is a Ctrl-C, ``"raise"`` an exception; ``"wait"``
            waits for :meth:`Rank.go_on`; ``"end pools"`` ends the rank's workers.
    """

    call: Literal["read", "resolve_tensor", "commit_tensor"]
    number: int
    kind: Literal["kill", "stop", "interrupt", "raise", "wait", "end pools"]


@dataclasses.dataclass(frozen=True)
class Work:
    """A load of one rank.

    Attributes:
        boxes: What it loads.
        client_config: How it reaches S3.
        pool_config: Settings of its pool.
        verify: As for the storage reader.
        mishaps: What happens to it.
        limits: Waiting times of the sharing, by the names of their constants, in place of the usual ones.
        before: Python statements to execute before it.
    """

    boxes: tuple[Box, ...]
    client_config: S3ClientConfig
    pool_config: PoolConfig
    verify: bool | Literal["whole"] = True
    mishaps: tuple[Mishap, ...] = ()
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    before: str = ""


class Place(NamedTuple):
    """A load of one rank of a process group.

    Attributes:
        work: What it loads.
        rank: Its rank.
        ranks: Number of the ranks.
        meet_at: URL at which torch's process group meets.
    """

    work: Work
    rank: int
    ranks: int
    meet_at: str


class Outcome(NamedTuple):
    """End of a rank's load.

    Attributes:
        result: ``"exact"``, ``"wrong"``, or the name of the error's class.
        text: Text of the error, or what is wrong.
        seconds: Duration.
        shared_bytes: Bytes that the rank got from its host's leader.
        received_bytes: Bytes that its own workers received.
        loaded_again: Number of items that the planner was given more than once.
    """

    result: str
    text: str
    seconds: float
    shared_bytes: int
    received_bytes: int
    loaded_again: int


def make_tensors(version: int = 0) -> dict[str, torch.Tensor]:
    """Returns the tensors of a version of the checkpoint: each number is there once."""
    count = ROWS * COLUMNS
    return {
        f"layer.{number:03}": (torch.arange(count, dtype=torch.int32) + count * (number + _TENSORS * version)).reshape(
            ROWS, COLUMNS
        )
        for number in range(_TENSORS)
    }


@functools.cache
def make_files(version: int = 0) -> Mapping[str, bytes]:
    """Returns the files of a version of the checkpoint by their paths on a server; all versions are as long."""
    writer = functools.partial(FileSystemWriter, thread_count=_FILES, sync_files=False)
    with tempfile.TemporaryDirectory(prefix="mpreader-ranks-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # no process group is needed
        save(make_tensors(version), storage_writer=writer(folder), no_dist=True)
        prefix = URI.removeprefix("s3:/")
        return {f"{prefix}/{file.name}": file.read_bytes() for file in Path(folder).iterdir()}


# -- the process that tests


class Nursery:
    """Makes ranks. A context manager: at its end all of them are killed."""

    def __init__(self) -> None:
        own, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scripts.faults.rank_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=_ROOT,
                env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(_ROOT)},
            )
        self._socket = own
        self._socket.settimeout(_STARTED_WITHIN_S)
        self._ranks: list[Rank] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
        self._socket.close()
        self._process.wait()

    def rank(self) -> Rank:
        """Returns a new rank."""
        own, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._socket, [b"\0"], [theirs.fileno()])
        rank = Rank(int.from_bytes(_received(self._socket, 4), "little"), Connection(own.detach()))
        self._ranks.append(rank)
        return rank


def _received(connection: socket.socket, nbytes: int) -> bytes:
    data = connection.recv(nbytes, socket.MSG_WAITALL)
    if len(data) < nbytes:
        raise RuntimeError("the process that makes the ranks has ended")
    return data


class Rank:
    """A process that loads. Every method is one step of a load.

    Attributes:
        pid: Its process id.
        is_dead: True after :meth:`kill`.
    """

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid = pid
        self.is_dead = False
        self._connection = connection

    def offer(self, work: Work) -> None:
        """Begin a load, up to the plan; :meth:`offered` returns what the rank then offers."""
        self._connection.send(("offer", work))

    def offered(self, within_s: float = 60.0) -> Any:
        """Returns the offer of the rank, in place of ``storage_data`` of its plan."""
        return self._answer(within_s)

    def join(self, place: Place) -> None:
        """Load by torch's ``load``, all steps of it, in a process group; then comes :meth:`outcome`."""
        self._connection.send(("join", place))

    def load(self, share: Any) -> None:
        """Read; ``share`` is the answer to the rank's offer."""
        self._connection.send(("load", share))

    def outcome(self, within_s: float = 60.0) -> Outcome | None:
        """Returns how the load has ended; None if the rank is dead.

        Raises:
            TimeoutError: It does not end.
        """
        answer = self._answer(within_s)
        assert answer is None or isinstance(answer, Outcome), f"it waits: {answer}"
        return answer

    def resume(self, within_s: float = 60.0) -> None:
        """Let a rank go on that a mishap has stopped, or is about to stop; returns when its load has ended."""
        deadline = time.monotonic() + within_s
        while not self.is_dead and not self._connection.poll(_POLL_S) and time.monotonic() < deadline:
            if _state_of(self.pid) == "T":
                self.signal(signal.SIGCONT)

    def wait_for_mishap(self, within_s: float = 60.0) -> None:
        """Wait until the rank waits, by a mishap of the kind ``"wait"``."""
        answer = self._answer(within_s)
        assert answer == "waits", answer

    def go_on(self) -> None:
        """End the wait of a mishap."""
        self._connection.send("go on")

    def close(self, *, all_of_it: bool = False, within_s: float = 60.0) -> list[str] | None:
        """Close the reader of the load; returns what is left of the sharing. None if the rank is dead.

        Args:
            all_of_it: End the shared pools, too; then nothing at all may be left.
            within_s: Time for it.
        """
        with contextlib.suppress(OSError):  # it is dead
            self._connection.send(("close", all_of_it))
        answer: list[str] | None = self._answer(within_s)
        return answer

    def signal(self, signum: int) -> None:
        """Send a signal."""
        if not self.is_dead:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill the process. Idempotent."""
        if not self.is_dead:
            self.signal(signal.SIGKILL)
            self.is_dead = True
            self._connection.close()

    def _answer(self, within_s: float) -> Any:
        if self.is_dead:
            return None
        try:
            if not self._connection.poll(within_s):
                self.signal(signal.SIGUSR1)  # it says where it waits
                raise TimeoutError(f"rank {self.pid} has not answered within {within_s:g} s")
            return self._connection.recv()
        except (EOFError, ConnectionError):
            self.kill()
            return None


class Job:
    """Ranks that load together. Made when all have planned.

    Args:
        ranks: The ranks.
        works: What each of them loads.

    Attributes:
        ranks: The ranks.
        shares: What each rank is told of its host.
    """

    def __init__(self, ranks: Sequence[Rank], works: Sequence[Work]) -> None:
        self.ranks = ranks
        for rank, work in zip(ranks, works, strict=True):
            rank.offer(work)
        offers = [rank.offered() for rank in ranks]
        self._addresses = [offer.address for offer in offers if offer is not None]
        self.shares = share_out(offers)

    def load(self, *places: int) -> None:
        """Let the ranks of these places read; without any, all of them."""
        for place in places or range(len(self.ranks)):
            self.ranks[place].load(self.shares[place])

    def left(self, *, all_of_it: bool = True) -> list[str]:
        """Close the ranks' readers; returns what is left of the load."""
        left = []
        for rank in self.ranks:
            left += rank.close(all_of_it=all_of_it) or []
        sockets = Path("/proc/net/unix").read_bytes()
        return left + [f"socket {name!r}" for name in self._addresses if name.replace(b"\0", b"@") in sockets]


def share_out(offers: Sequence[Any]) -> list[Any]:
    """Returns the answers to the offers of ranks, as DCP's planning makes them."""
    return [plan.storage_data for plan in group_plans([LoadPlan([], storage_data=offer) for offer in offers])]


def _state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
