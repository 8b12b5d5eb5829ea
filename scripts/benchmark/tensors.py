"""Contenders of loads of safetensors files, and the task that loads with them.

measure.py runs the task for the workloads of ``scripts/bench safetensors``. A contender is a function that gives
``(name, tensor)`` pairs; each maker imports its library when it is called, so that a process imports one of them only.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import torch
from checkpoints import BUCKET, Checkpoint, checkpoint_of
from fetches import parts_of
from floor import Processes, Threads, floor_sizes
from isal import isal_zlib
from tasks import Job, WrongBytes

__all__ = ["SHARES", "Load", "TensorTask", "check_tensors", "quarter", "runai_streamer"]

SHARES: Final = {"half": 0.5, "rows": 0.25}  # of the bytes; all of them in other workloads
Pairs = Iterable[tuple[str, torch.Tensor]]
Load = Callable[[], Pairs]


class TensorTask:
    """Loads a checkpoint of safetensors files into fresh tensors, which the run before has let go of."""

    def __init__(self, job: Job) -> None:
        self.target_ranges: list[tuple[int, int]] = []
        self.cuts = 0
        self._stored = Checkpoint(job.data / BUCKET / checkpoint_of(job.workload))
        self._workload = job.workload
        self._checking = job.checking
        self._floor = _Floor(job, self._stored) if job.contender.startswith("floor") else None
        self._load = self._floor.load if self._floor is not None else _maker(job)(job, self._stored)
        self._tensors: dict[str, torch.Tensor] = {}
        self._crcs: dict[str, int] = {}  # of tensors that were let go

    def prepare(self) -> None:
        self._tensors, self._crcs = {}, {}
        if self._floor is not None:
            self._floor.prepare()

    def run(self) -> None:
        if self._workload != "streamed":
            self._tensors = dict(self._load())
            return
        for name, tensor in self._load():
            # Not copies: memory is sampled in the round in which bytes are compared.
            self._crcs[name] = isal_zlib.crc32(tensor.view(torch.uint8).numpy()) if self._checking else 0

    def check(self) -> None:
        if self._workload == "streamed":
            if self._crcs != self._stored.crcs:
                raise WrongBytes("of a tensor that was streamed")
            return
        wanted = _names(self._stored)[::2] if self._workload == "half" else _names(self._stored)
        check_tensors(self._tensors, wanted, self._stored.folder, quarter(0) if self._workload == "rows" else None)

    def close(self) -> None:
        self._tensors = {}
        if self._floor is not None:
            self._floor.close()


def check_tensors(
    tensors: dict[str, torch.Tensor], wanted: list[str], folder: Path, rows: Callable[[int], slice] | None
) -> None:
    """Compare tensors, bit by bit, with what the safetensors package reads from the files.

    Args:
        tensors: What was loaded.
        wanted: Names of the tensors that were to be loaded.
        folder: Folder of the files.
        rows: Rows that were wanted of a tensor of so many; None: all.

    Raises:
        WrongBytes: A tensor is missing, not wanted, or has another type, shape or content.
    """
    from safetensors import safe_open

    if set(tensors) != set(wanted):
        raise WrongBytes("other tensors than those that were asked for")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in tensors.keys() & set(stored.keys()):
                expected = stored.get_tensor(name)
                if rows is not None:
                    expected = expected[rows(len(expected))]
                if not _are_same(tensors[name], expected):
                    raise WrongBytes(name)


def _are_same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
        return False
    return torch.equal(tensor.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def quarter(number: int) -> Callable[[int], slice]:
    """Function of a number of rows that gives the rows of one of four ranks."""
    return lambda rows: slice(rows * number // 4, rows * (number + 1) // 4)


def _names(stored: Checkpoint) -> list[str]:
    return list(stored.shapes)


def _maker(job: Job) -> Callable[[Job, Checkpoint], Load]:
    return {"mpreader": _mpreader, "runai": _runai, "runai-clone": _runai}[job.contender]


def _mpreader(job: Job, stored: Checkpoint) -> Load:
    from mpreader import S3ClientConfig
    from mpreader.safetensors import load_checkpoint

    uri = f"s3://{BUCKET}/{stored.folder.name}"
    options: dict[str, Any] = {"s3client_config": S3ClientConfig(force_path_style=True)}
    if job.workload == "streamed":
        from mpreader.safetensors import stream

        return lambda: _streamed(stream(uri, **options))
    if job.workload == "half":
        options["names"] = _names(stored)[::2]
    if job.workload == "rows":
        options["slices"] = {name: (quarter(0)(shape[0]),) for name, shape in stored.shapes.items()}
    return lambda: load_checkpoint(uri, **options).items()


def _streamed(stream: Any) -> Iterator[tuple[str, torch.Tensor]]:
    with stream as pairs:
        yield from pairs


def runai_streamer() -> Any:
    """Import Run:ai's streamer, set to the benchmark's server; returns the class of its sessions."""
    os.environ["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = "0"
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    from runai_model_streamer import SafetensorsStreamer

    return SafetensorsStreamer


def _runai(job: Job, stored: Checkpoint) -> Load:
    """Run:ai's streamer: by default its tensors are the caller's; cloned ones are read into buffers that it reuses."""
    streamer = runai_streamer()
    files = [f"s3://{BUCKET}/{key}" for key in stored.files]
    names = _names(stored)[::2] if job.workload == "half" else None
    is_cloning = job.contender == "runai-clone"
    is_owned = not is_cloning and job.workload != "streamed"

    def load() -> Iterator[tuple[str, torch.Tensor]]:
        with streamer() as session:
            session.stream_files(files, owned=is_owned, tensor_names=names)
            for name, tensor in session.get_tensors():
                yield name, tensor.clone() if is_cloning else tensor

    return load


class _Floor:
    """Lower bound: bare sockets that receive whole files into memory which was never touched; see floor.py.

    Processes or threads are started, and connected, before the time begins: those of a warm pool are there, too.
    """

    def __init__(self, job: Job, stored: Checkpoint) -> None:
        address = urlsplit(job.site.endpoint_url)
        self._address = (address.hostname or "", address.port or 80)
        self._sizes = stored.files
        self._parts = list(parts_of(self._sizes))
        self._layout = list(_layout(stored))
        self._is_private = job.contender == "floor-private"
        self._receivers: Processes | Threads | None = None
        self._memory: mmap.mmap | None = None

    def prepare(self) -> None:
        self.close()
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        flags = {"flags": private} if self._is_private else {}
        self._memory = mmap.mmap(-1, sum(self._sizes.values()), **flags)
        kind = Threads if self._is_private else Processes
        self._receivers = kind(self._address, floor_sizes(), self._memory, [key for key, _, _ in self._parts])

    def load(self) -> Pairs:
        assert self._receivers is not None
        assert self._memory is not None
        offset = 0
        for number, (_, start, end) in enumerate(self._parts):
            self._receivers.request(number, start, end, offset)
            offset += end - start
        for _ in self._parts:
            self._receivers.done()
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        return [(name, flat[at : at + size].view(torch.float32).view(shape)) for name, shape, at, size in self._layout]

    def close(self) -> None:
        if self._receivers is not None:
            self._receivers.close()
        self._receivers = self._memory = None


def _layout(stored: Checkpoint) -> Iterator[tuple[str, list[int], int, int]]:
    """For each tensor its name, its shape, its first byte in all files together, and its size."""
    before = 0
    for key, size in stored.files.items():
        with (stored.folder.parent / key).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, entry["shape"], before + 8 + length + start, end - start
        before += size
