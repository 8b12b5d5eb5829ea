"""Process of a rank: loads what :mod:`scripts.faults.ranks` tells it to, and suffers what it tells it to.

Run as a program it is the process that all ranks are forked from. It must not use that module's other side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load

import mpreader.dcp.reader
import mpreader.dcp.sharing
import mpreader.pool.hosts.member
import mpreader.pool.hosts.server
from mpreader import S3ClientConfig
from mpreader.dcp import S3StorageReader
from mpreader.pool.pool import close_shared_pools
from scripts.faults.ranks import URI, Box, Mishap, Outcome, Place, Work, make_tensors

__all__ = ["main"]


class RankError(Exception):
    """A planner's error, of a kind that mpreader knows nothing of."""


class _Planner(LoadPlanner):
    """Planner of some boxes, each with a target of its own, to which the mishaps happen."""

    def __init__(self, boxes: Sequence[Box], mishap: Any) -> None:
        self._boxes = boxes
        self._mishap = mishap
        self.targets: list[tuple[Box, torch.Tensor]] = []
        self._target_of: dict[tuple[str, tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}
        self.items: list[ReadItem] = []
        self.committed: list[ReadItem] = []

    def set_up_planner(
        self, _: STATE_DICT_TYPE, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        del is_coordinator
        assert metadata is not None
        for box in self._boxes:
            stored = metadata.state_dict_metadata[box.name]
            assert isinstance(stored, TensorStorageMetadata)
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            if 0 not in box.sizes:
                self.items += create_read_items_for_chunk_list(box.name, stored, [chunk])
            target = torch.full(box.sizes, -1, dtype=torch.int32)
            self.targets.append((box, target))
            self._target_of[box.name, tuple(box.offsets), tuple(box.sizes)] = target

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, _: ReadItem, __: io.BytesIO) -> None:
        raise AssertionError("the checkpoint of the ranks has tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        self._mishap("resolve_tensor")
        offsets = tuple(read_item.storage_offsets)
        return self._target_of[read_item.storage_index.fqn, offsets, tuple(read_item.lengths)]

    def commit_tensor(self, read_item: ReadItem, _: torch.Tensor) -> None:
        self.committed.append(read_item)
        self._mishap("commit_tensor")

    def find_wrong(self, versions: Sequence[Mapping[str, torch.Tensor]]) -> str:
        """Returns what is not as in any of the versions; "" if all is well."""
        for box, target in self.targets:
            (row, column), (rows, columns) = box.offsets, box.sizes
            if not any(
                torch.equal(target, tensors[box.name][row : row + rows, column : column + columns])
                for tensors in versions
            ):
                return f"{box} is wrong"
        committed = set(map(repr, self.committed))
        if committed != set(map(repr, self.items)):
            return f"{len(committed)} of {len(self.items)} items were committed"
        return ""


class _Loads:
    """The loads of a rank, in its process."""

    def __init__(self, connection: Connection, versions: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self._connection = connection
        self._versions = versions
        self._before = set(_held())
        self._is_loading = False
        self._reader: S3StorageReader | None = None
        self._planner: _Planner | None = None
        self._plan = LoadPlan([])
        self._work: Work | None = None
        self._calls: dict[str, int] = {}
        self._usual = {name: getattr(module, name) for name, module in _LIMITS.items()}
        # The error of the load, with all of its frames, is kept until the load is closed, as DCP keeps it.
        self._error: BaseException | None = None
        signal.signal(signal.SIGINT, self._interrupted)
        faulthandler.register(signal.SIGUSR1)

    def serve(self) -> None:
        """Do what is asked for, until the other end is closed."""
        while True:
            try:
                step, argument = self._connection.recv()
            except EOFError:
                return
            steps = {"offer": self._offer, "load": self._load, "join": self._join, "close": self._close}
            self._connection.send(steps[step](argument))

    def _set_up(self, work: Work) -> tuple[S3StorageReader, _Planner]:
        for name, value in {**self._usual, **work.limits}.items():
            setattr(_LIMITS[name], name, value)
        self._work, self._calls, self._error = work, {}, None
        exec(work.before, {})  # the process that tests says what
        self._reader = S3StorageReader(
            None, URI, work.client_config, pool_config=work.pool_config, verify=work.verify, progress=False
        )
        self._planner = _Planner(work.boxes, self._mishap)
        return self._reader, self._planner

    def _offer(self, work: Work) -> Any:
        reader, planner = self._set_up(work)
        reader.reset()
        metadata = reader.read_metadata()
        planner.set_up_planner({}, metadata)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._plan = reader.prepare_local_plan(planner.create_local_plan())
        return self._plan.storage_data

    def _load(self, share: Any) -> Outcome:
        reader, planner = self._reader, self._planner
        assert reader is not None
        assert planner is not None
        plan = dataclasses.replace(self._plan, storage_data=share)
        return self._outcome_of(lambda: reader.read_data(plan, planner).wait())

    def _join(self, place: Place) -> Outcome:
        """Load by torch's own ``load``, as one of the ranks of a process group."""
        reader, planner = self._set_up(place.work)
        dist.init_process_group("gloo", init_method=place.meet_at, rank=place.rank, world_size=place.ranks)
        try:
            return self._outcome_of(lambda: load({}, storage_reader=reader, planner=planner))
        finally:
            dist.destroy_process_group()

    def _outcome_of(self, read: Callable[[], object]) -> Outcome:
        assert self._reader is not None
        assert self._planner is not None
        began_s = time.monotonic()
        result = text = ""
        try:
            self._is_loading = True
            self._mishap("read")
            read()
        except BaseException as error:  # noqa: BLE001  # judged by the process that tests
            self._error, result, text = error, type(error).__name__, str(error)
        finally:
            self._is_loading = False
        if not result:
            text = self._planner.find_wrong(self._versions)
            result = "wrong" if text else "exact"
        stats = self._reader.stats
        again = len(self._planner.committed) - len(set(map(repr, self._planner.committed)))
        return Outcome(result, text, time.monotonic() - began_s, stats.shared_bytes, stats.bytes, again)

    def _close(self, all_of_it: bool) -> list[str]:  # comes by position
        if self._reader is not None:
            self._reader.close()
        self._reader = self._planner = self._error = None
        self._plan = LoadPlan([])
        if all_of_it:
            close_shared_pools()
        deadline = time.monotonic() + 10
        while (left := self._left(all_of_it=all_of_it)) and time.monotonic() < deadline:
            gc.collect()
            threading.Event().wait(0.01)
        return left

    def _left(self, *, all_of_it: bool) -> list[str]:
        threads = {thread.name for thread in threading.enumerate()}
        left = sorted(name for name in threads if name.startswith("mpreader-host"))
        if all_of_it:
            left += sorted(set(_held()) - self._before)
        return left

    def _mishap(self, call: str) -> None:
        self._calls[call] = self._calls.get(call, 0) + 1
        assert self._work is not None
        for mishap in self._work.mishaps:
            if (mishap.call, mishap.number) == (call, self._calls[call]):
                self._suffer(mishap)

    def _suffer(self, mishap: Mishap) -> None:
        if mishap.kind == "raise":
            raise RankError(f"in {mishap.call}")
        if mishap.kind == "wait":
            self._connection.send("waits")
            self._connection.recv()
        elif mishap.kind == "end pools":
            close_shared_pools()
        else:
            signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "interrupt": signal.SIGINT}
            os.kill(os.getpid(), signals[mishap.kind])

    def _interrupted(self, *_: object) -> None:
        if self._is_loading:  # later it has come too late, and the rank is to live on
            raise KeyboardInterrupt


_LIMITS: Final[dict[str, Any]] = {
    "_SILENCE_S": mpreader.pool.hosts.member,
    "_JOIN_S": mpreader.pool.hosts.member,
    "_GATHER_S": mpreader.pool.hosts.server,
    "_HEARTBEAT_S": mpreader.pool.hosts.server,
    "_VERDICT_S": mpreader.dcp.sharing,
}


def _held() -> Iterator[str]:
    """Threads, descriptors and mapped memory of this process that a load may leave behind, in words."""
    for thread in threading.enumerate():
        if thread.name.startswith("mpreader"):
            yield f"thread {thread.name}"
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(f"/proc/self/fd/{entry}")
            if not name.startswith("/"):
                yield f"descriptor {entry} ({name})"
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:mpreader" in line:
            yield f"mapped memory {line.split()[4]}"


def _run_rank(connection: Connection, versions: Sequence[Mapping[str, torch.Tensor]]) -> None:
    # The process that tests hands the offers round, in the place of a process group.
    mpreader.dcp.reader.has_other_ranks = lambda: True
    mpreader.dcp.reader.is_likely_leader = lambda: False
    _Loads(connection, versions).serve()


def _prepare() -> None:
    """Import and read, once for all ranks, what each of them would else import and read by itself."""
    import botocore.loaders
    import numpy as np  # noqa: F401

    from mpreader.s3.session import Session

    # Each new session of botocore reads its descriptions of S3 again, which takes longer than most loads.
    load_file = functools.cache(botocore.loaders.JSONFileLoader().load_file)
    botocore.loaders.JSONFileLoader.load_file = lambda _, file_path: load_file(file_path)
    Session(S3ClientConfig("us-east-1")).make_client("us-east-1").close()


def main() -> None:
    """Fork ranks until the other end of the socket is closed."""
    _prepare()
    parent = socket.socket(fileno=int(sys.argv[1]))
    versions = [make_tensors(0), make_tensors(1)]
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the ranks
    while True:
        data, fds, _, _ = socket.recv_fds(parent, 1, 1)
        if not data:
            return
        pid = os.fork()
        if pid == 0:
            parent.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _run_rank(Connection(fds[0]), versions)
            except BaseException:  # noqa: BLE001  # whatever it is, only this process ends
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(fds[0])
        parent.sendall(pid.to_bytes(4, "little"))


if __name__ == "__main__":
    main()
