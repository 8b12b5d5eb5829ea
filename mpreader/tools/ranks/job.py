"""Job: ranks of this machine that load a checkpoint together, timed, and what their host received for it.

``mpreader load --ranks`` and the demo run it. The ranks are processes of their own, which end with this one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mpreader.dcp.job import describe
from mpreader.dcp.sharding import shard_bytes
from mpreader.dcp.state import state_bytes
from mpreader.errors import MpreaderError
from mpreader.pool.coordinator.interpreter import find_interpreter
from mpreader.tools.bench.memory import TreeMemory, tree_memory_bytes
from mpreader.tools.bench.targets import planned_state
from mpreader.tools.ranks.messages import Failed, Go, JobSettings, Loaded, RankFailed, RankLoad, Ready, Stop

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.dcp.checkpoint import LoadOptions
    from mpreader.telemetry.timeline import Timeline

__all__ = ["HostLoad", "time_rank_loads"]

_ENDING_S: Final = 5.0  # after which ranks that have not ended by themselves are killed
_LAUNCHER: Final = "mpreader.tools.ranks.launcher"
Answer = TypeVar("Answer", Ready, Loaded)


@dataclass(frozen=True, slots=True)
class HostLoad:
    """Measurements of one load by all ranks.

    Attributes:
        starts_workers: True if the time includes starting the worker processes, as in the first load.
        seconds: Wall time until the last rank had loaded.
        needed_nbytes: Bytes of the tensors in memory; what several ranks have counts once.
        received_nbytes: Bytes that all ranks together received, gaps and repetitions included.
        extra_memory_bytes: Most memory that the ranks and their workers took, beyond what they had before the first
            load; the targets were there by then. Shared memory is counted once.
        ranks: The ranks.
    """

    starts_workers: bool
    seconds: float
    needed_nbytes: int
    received_nbytes: int
    extra_memory_bytes: int
    ranks: tuple[RankLoad, ...]

    @property
    def received_per_needed(self) -> float | None:
        """Bytes received for each byte that the host needs; None if it needs nothing."""
        return self.received_nbytes / self.needed_nbytes if self.needed_nbytes else None


def time_rank_loads(
    uri: str, options: LoadOptions, ranks: int, dim: int | None, repeat: int = 1, timeline: Timeline | None = None
) -> Iterator[HostLoad]:
    """Load a checkpoint by several ranks of this machine, into the same targets ``repeat`` times.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        options: Options of each load. ``weights_only`` is of no effect: items that are no tensors are dropped.
        ranks: Number of ranks.
        dim: Dimension in which each tensor is divided among them, as by DTensor's ``Shard``. None: each has all of it.
        repeat: Number of loads.
        timeline: Gets the requests of all ranks; None: they are not recorded.

    Yields:
        The measurements of each load, when it is over.

    Raises:
        RankFailed: A rank has ended, or has failed with an error that is none of mpreader's.
        MpreaderError: As for :func:`mpreader.dcp.load_checkpoint`.
    """

    def bytes_needed(state: dict[str, Any]) -> int:
        if dim is None:
            return ranks * state_bytes(state)
        return sum(shard_bytes(state, dim, rank, ranks) for rank in range(ranks))

    planned = planned_state(uri, options, bytes_needed)
    needed_nbytes = state_bytes(planned)
    level = logging.getLogger("mpreader").level
    with _Ranks(ranks) as job:
        job.send(JobSettings(uri, options, describe(planned), dim, job.port, timeline is not None, level))
        job.answers(Ready)
        memory_before = tree_memory_bytes(os.getpid())
        for number in range(repeat):
            loaded, memory_bytes = _load(job, memory_before)
            if timeline is not None:
                for rank, one in enumerate(loaded):
                    timeline.add(rank + 1, one.recorded)
            loads = tuple(one.load for one in loaded)
            yield HostLoad(
                starts_workers=number == 0,
                seconds=max(load.seconds for load in loads),
                needed_nbytes=needed_nbytes,
                received_nbytes=sum(load.received_nbytes for load in loads),
                extra_memory_bytes=memory_bytes,
                ranks=loads,
            )
        job.send(Stop())


def _load(job: _Ranks, memory_before: int) -> tuple[list[Loaded], int]:
    """Let all ranks load once; returns what they say, and the most memory that they took beyond ``memory_before``."""
    # TreeMemory counts from its own start: what an earlier load has left in the pools is added.
    added_before = tree_memory_bytes(os.getpid()) - memory_before
    with TreeMemory() as memory:
        job.send(Go())
        loaded = job.answers(Loaded)
    added = tree_memory_bytes(os.getpid()) - memory_before
    return loaded, max(added, added_before + memory.peak_extra_bytes)


class _Ranks:
    """Processes of the ranks; a context manager, which ends them.

    Args:
        number: Number of ranks.

    Attributes:
        port: Port of 127.0.0.1 on which they find each other.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._channels: list[Connection] = []
        self._exit_codes: dict[int, int] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # It listens from now on, on no other address, and so no rank can come too early or be met by a stranger.
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            self.port: int = listening.getsockname()[1]
            pairs = [Pipe() for _ in range(self._number)]
            self._channels = [ours for ours, _ in pairs]
            theirs = [stack.enter_context(other) for _, other in pairs]
            descriptors = [listening.fileno(), *(other.fileno() for other in theirs)]
            self._launcher = subprocess.Popen(  # noqa: S603
                [find_interpreter(), "-m", _LAUNCHER, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                env={**os.environ, **_environment()},
                text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends the ranks
            )
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._kill()
        self._end()

    def send(self, message: JobSettings | Go | Stop) -> None:
        """Tell all ranks."""
        for channel in self._channels:
            with contextlib.suppress(BrokenPipeError):  # a rank has ended: the next answers tell
                channel.send(message)

    def answers(self, kind: type[Answer]) -> list[Answer]:
        """Wait for an answer of each rank.

        Raises:
            MpreaderError: A rank has failed; all have ended.
        """
        answers: dict[int, Answer] = {}
        while len(answers) < self._number:
            for rank in self._wait(set(range(self._number)) - set(answers)):
                message = self._receive(rank)
                if not isinstance(message, kind):
                    raise self._failure({rank: message})
                answers[rank] = message
        return [answers[rank] for rank in range(self._number)]

    def _wait(self, ranks: set[int], timeout_s: float | None = None) -> list[int]:
        ready = wait([self._channels[rank] for rank in ranks], timeout_s)
        return [rank for rank in sorted(ranks) if self._channels[rank] in ready]

    def _receive(self, rank: int) -> Any:
        """Returns the next message of a rank; None if it has ended."""
        try:
            return self._channels[rank].recv()
        except (EOFError, OSError):
            return None

    def _failure(self, messages: dict[int, Any]) -> MpreaderError:
        """Returns the error that says best why ranks fail, of which one was noticed."""
        left = set(range(self._number)) - set(messages)
        # The others soon fail, too, and one of them may be the reason.
        while left and (ready := self._wait(left, _ENDING_S)):
            for rank in ready:
                messages[rank] = self._receive(rank)
                if not isinstance(messages[rank], (Ready, Loaded)):
                    left.discard(rank)
        self._kill_after_a_while()
        errors: list[MpreaderError] = [
            messages[rank].error for rank in sorted(messages) if isinstance(messages[rank], Failed)
        ]
        own = [error for error in errors if not isinstance(error, RankFailed)]
        ended: list[MpreaderError] = [self._ended(rank) for rank in sorted(messages) if messages[rank] is None]
        return [*own, *ended, *errors][0]

    def _ended(self, rank: int) -> RankFailed:
        code = self._exit_codes.get(rank)
        return RankFailed(f"rank {rank} has ended without a word: {_cause(code)}", rank=rank)

    def _kill(self) -> None:
        # Its session, with the ranks and their workers.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._launcher.pid, signal.SIGKILL)

    def _end(self) -> None:
        self._kill_after_a_while()
        for channel in self._channels:
            channel.close()

    def _kill_after_a_while(self) -> None:
        """Wait until the ranks have ended; those that have not, after a time, are killed."""
        if self._launcher.stdout is None or self._launcher.stdout.closed:
            return
        try:
            told = self._launcher.communicate(timeout=_ENDING_S)[0]
        except subprocess.TimeoutExpired:
            self._kill()
            told = self._launcher.communicate()[0]
        self._exit_codes = dict(_numbers(told))


def _numbers(told: str) -> Iterator[tuple[int, int]]:
    for line in told.splitlines():
        rank, code = line.split()
        yield int(rank), int(code)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name}, as where memory is used up" if name == "SIGKILL" else name
    return "it could not be started" if code is None else f"exit code {code}"


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),  # as torchrun does
        "OPENBLAS_NUM_THREADS": "1",  # its threads, started by an import, would be there when the launcher forks
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # a rank that ends is told of once
        "GLOO_SOCKET_IFNAME": "lo",  # the host's name may lead to an address that is not its own
    }
