"""Fill: receives the bytes of wanted tensors, in the order of the files, and copies them into their targets."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from mpreader.collector import collector_paused
from mpreader.dcp.tensor import copy_into
from mpreader.errors import ArenaError, PoolError, TransportError
from mpreader.fetch.safetensors import FileFetcher
from mpreader.fetch.safetensors_plan import WantedBox, cut_runs, plan_boxes
from mpreader.safetensors.prefault import Prefault
from mpreader.safetensors.wanted import WantedTensor
from mpreader.telemetry.progress import Progress, progress_bar

__all__ = ["fill", "filled"]

_Pieces = Iterator[tuple[str, int, memoryview]]


def _as_it_is(tensor: WantedTensor) -> WantedTensor:
    return tensor


def fill(fetcher: FileFetcher, wanted: Sequence[WantedTensor], *, progress: bool | None) -> None:
    """Load tensors into their targets.

    Args:
        fetcher: What reads their files.
        wanted: The tensors, in the order of the files and of their bytes.
        progress: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.

    Raises:
        TransportError: The bytes could not be received; the error names the tensor.
        PoolError: The worker pool has failed; the error names the tensor.
        ArenaError: Shared memory is used up; the error names the tensor.
    """
    targets = [tensor.target for tensor in wanted]
    with Prefault(targets):
        deque(filled(fetcher, wanted, progress=progress), maxlen=0)


def filled(
    fetcher: FileFetcher,
    wanted: Sequence[WantedTensor],
    *,
    progress: bool | None = False,
    make: Callable[[WantedTensor], WantedTensor] = _as_it_is,
) -> Generator[WantedTensor, None, None]:
    """Yield each tensor when it is loaded, while the bytes of the next ones are received.

    Args:
        fetcher: As for :func:`fill`; so is ``wanted``, and so are the errors.
        wanted: The tensors.
        progress: As for :func:`fill`.
        make: Gives a tensor its target when it is its turn; until then it may have one on ``meta``.
    """
    with collector_paused():
        boxes = [_box_of(tensor) for tensor in wanted]
        runs, gap = plan_boxes(boxes)
        ranges = cut_runs(boxes, runs, fetcher.part_size)
    nbytes = sum(end - start for of_file in ranges.values() for start, end in of_file)
    stream = fetcher.stream_many(ranges, order="offset", max_gap_size=gap)
    with closing(stream), progress_bar(nbytes, "load", show=progress) as bar:
        received = _Received(stream, ranges, bar)
        for planned in wanted:
            received.begin(planned)
            tensor = make(planned)
            try:
                _copy(received, tensor)
            except (TransportError, PoolError, ArenaError) as error:
                raise error.needed_for(tensor.stored.name) from error.__cause__
            yield tensor


def _copy(received: _Received, tensor: WantedTensor) -> None:
    layout, target, asked = tensor.layout, tensor.target, tensor.asked
    is_as_stored = target.dtype == layout.dtype and asked.lengths == layout.size
    if not (is_as_stored and type(target) is torch.Tensor and target.is_cpu and target.is_contiguous()):
        copy_into(received, layout, target, asked.offsets, asked.lengths, verify=False)
    elif received.size:  # most tensors: it is quicker for the small ones
        received.copy_to(target.view(-1).view(torch.uint8).numpy())


def _box_of(tensor: WantedTensor) -> WantedBox:
    is_whole = tensor.asked.lengths == tensor.layout.size
    return WantedBox(tensor.file.source, tensor.stored, None if is_whole else tensor.asked.box)


class _Received:
    """Bytes of one tensor after the other, taken from a stream in their order, as the copier reads an item.

    At most one piece is held, and none while the next one is waited for: memory may have room for no more.
    """

    def __init__(self, stream: _Pieces, ranges: Mapping[str, Sequence[tuple[int, int]]], progress: Progress) -> None:
        self._stream = stream
        self._ranges = ranges
        self._progress = progress
        self._piece = memoryview(b"")
        self._piece_start = 0  # in the tensor
        self._tensor_start = 0  # in its file
        self.size = 0

    def begin(self, tensor: WantedTensor) -> None:
        """Go on to the next tensor."""
        self._piece, self._piece_start = memoryview(b""), 0
        self._tensor_start = tensor.stored.start
        self.size = tensor.stored.end - tensor.stored.start

    def copy_to(self, target: np.ndarray[Any, Any]) -> None:
        """Copy all bytes of the tensor to an array of its size."""
        start = 0
        while start < self.size:
            self._take_next()
            end = start + len(self._piece)
            # numpy's copy releases the GIL, which the pool's threads need.
            np.copyto(target[start:end], np.frombuffer(self._piece, np.uint8))
            start = end
        self._piece = memoryview(b"")

    def view(self, start: int, end: int) -> memoryview:
        """Return bytes ``[start, end)``, copied."""
        return memoryview(bytearray().join(self.pieces(start, end)))

    def pieces(self, start: int, end: int) -> Generator[memoryview, None, None]:
        """Yield the bytes ``[start, end)`` of the tensor; they are read forwards."""
        while start < end:
            while self._piece_start + len(self._piece) <= start:
                self._take_next()
            stop = min(end, self._piece_start + len(self._piece))
            yield self._cut(start, stop)
            start = stop

    def _cut(self, start: int, stop: int) -> memoryview:
        cut = self._piece[start - self._piece_start : stop - self._piece_start]
        if len(self._piece) == stop - self._piece_start:  # the caller alone keeps its memory
            self._piece, self._piece_start = memoryview(b""), stop
        return cut

    def _take_next(self) -> None:
        self._piece = memoryview(b"")
        source, index, self._piece = next(self._stream)
        self._piece_start = self._ranges[source][index][0] - self._tensor_start
        self._progress.advance(len(self._piece))
