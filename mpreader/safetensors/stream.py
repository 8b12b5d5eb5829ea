"""Stream: hands out the tensors of a checkpoint one after the other, in bounded memory.

Most tensors are views of slots of shared memory. A slot is received into again once the tensor, and all that was made
of it without a copy, is gone::

    small, on the CPU, not converted ─┬─► view of a slot
                                      └─► copy of it, while too much memory is held by other views
    any other ──────────────────────────► new tensor, filled piece by piece

So no tensor is ever overwritten, and a program that keeps all tensors gets all of them.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

import numpy as np
import torch

from mpreader.config import PoolConfig, S3ClientConfig
from mpreader.dcp.new_memory import unfilled_memory
from mpreader.errors import ArenaError, ConfigError, PoolError, TransportError
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.formats.gaps import best_gaps
from mpreader.formats.layout import TensorLayout
from mpreader.formats.safetensors import StoredTensor
from mpreader.formats.selection import Run
from mpreader.formats.torch_tensors import layout_of
from mpreader.safetensors.leases import HELD_SLOTS
from mpreader.safetensors.wanted import check_names, choose, converted

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TensorStream", "stream"]

Order = Literal["completion", "file"]

# A view of more than an eighth of shared memory would leave too little of it to what is received meanwhile; so would
# views that hold more than half of it together.
_LARGEST_VIEW_DIVISOR: Final = 8
_HELD_DIVISOR: Final = 2
_LARGEST_ITEMSIZE: Final = 16  # bytes; pieces are cut at multiples of it, so that no element is divided


def stream(  # noqa: D417  # load_file explains the other arguments
    uri: str | os.PathLike[str],
    *,
    order: Order = "completion",
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    headers: Mapping[str, str] | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
) -> TensorStream:
    """Hand out the tensors of a file or directory one after the other, as they arrive.

    Args:
        uri: File or directory, as for :func:`~mpreader.safetensors.load_checkpoint`. The arguments that are not listed
            here are those of :func:`~mpreader.safetensors.load_file`.
        order: ``"completion"`` hands tensors out as they arrive, which is the fastest; ``"file"`` in the order of the
            files and of their bytes. Tensors without bytes come first in either case.

    Returns:
        An iterator of ``(name, tensor)``, which is also a context manager. It receives
        into shared memory of ``pool_config.max_memory`` bytes, which is used again as tensors are dropped. A tensor
        that is kept stays valid and is never overwritten: once kept tensors hold half of that memory, further ones get
        memory of their own. (Views of fetches of the same pool are not among those that count: with more of them than
        the other half, a stream ends in ``ArenaExhausted``.)

    Raises:
        MpreaderError: Before the first tensor, or from the iterator: the errors of
            :func:`~mpreader.safetensors.load_checkpoint`.
    """
    if order not in get_args(Order):
        raise ConfigError(f'order is "completion" or "file", got {order!r}')
    check_names(names)
    uri = path_of(uri)
    with contextlib.ExitStack() as stack:
        fetcher = fetcher_of(uri, s3client_config, pool_config, headers)
        stack.callback(fetcher.close)
        files = stack.enter_context(opened(fetcher, files_of(fetcher, uri, names)))
        plan = _plan(choose(files, names), fetcher, torch.device(device), dtype)
        pieces = fetcher.stream_many(
            plan.ranges, order="offset" if order == "file" else order, max_gap_size=plan.max_gap_bytes
        )
        stack.callback(pieces.close)
        return TensorStream(plan, pieces, fetcher.max_memory, stack.pop_all())


class _Streamed(NamedTuple):
    """Tensor of a stream.

    Attributes:
        name: Its name.
        layout: Layout of the tensor in its bytes of the file.
        dtype: Type that it is handed out as.
        device: Device that it is handed out on.
        may_view: True if it may be a view of shared memory.
    """

    name: str
    layout: TensorLayout
    dtype: torch.dtype
    device: torch.device
    may_view: bool


class _Plan(NamedTuple):
    """Plan of a stream.

    Attributes:
        tensors: The tensors.
        ranges: Half-open byte ranges to receive of each file, by the fetcher's name of the file.
        places: For each of these ranges, the index of its tensor in ``tensors``, and its first byte in that tensor.
        max_gap_bytes: Largest gap between two ranges that are requested as one.
    """

    tensors: Sequence[_Streamed]
    ranges: Mapping[str, list[tuple[int, int]]]
    places: Mapping[str, list[tuple[int, int]]]
    max_gap_bytes: int


def _plan(
    chosen: Sequence[tuple[StoredFile, StoredTensor]],
    fetcher: FileFetcher,
    device: torch.device,
    dtype: torch.dtype | None,
) -> _Plan:
    tensors: list[_Streamed] = []
    ranges: dict[str, list[tuple[int, int]]] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for number, (file, stored) in enumerate(chosen):
        layout = layout_of(stored)
        own = converted(layout.dtype, dtype)
        is_small = layout.payload_nbytes <= fetcher.max_memory // _LARGEST_VIEW_DIVISOR
        one = _Streamed(stored.name, layout, own, device, is_small and device.type == "cpu" and own == layout.dtype)
        tensors.append(one)
        piece_bytes = max(1, fetcher.part_size // _LARGEST_ITEMSIZE) * _LARGEST_ITEMSIZE
        step = max(1, layout.payload_nbytes) if one.may_view else piece_bytes
        for start in range(stored.start, stored.end, step):
            ranges.setdefault(file.source, []).append((start, min(start + step, stored.end)))
            places.setdefault(file.source, []).append((number, start - stored.start))
    gaps = best_gaps(lambda _: [[Run(*one) for one in of_file] for of_file in ranges.values()])
    return _Plan(tensors, ranges, places, gaps.between_records)


class TensorStream:
    """Iterator over tensors, made by :func:`stream`. Not thread-safe.

    Downloads begin when the first tensor is asked for. They end after the last one, with ``close()``, at an error, or
    when the stream is dropped.

    Args:
        plan: What is handed out.
        pieces: The file, index and bytes of each range of the plan, in any order.
        max_memory: Size of the pool's shared memory, in bytes.
        stack: Closed at the end of the stream.
    """

    def __init__(
        self,
        plan: _Plan,
        pieces: Iterator[tuple[str, int, memoryview]],
        max_memory: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self._plan = plan
        self._pieces = pieces
        self._max_held_bytes = max_memory // _HELD_DIVISOR
        self._stack = stack
        self._unfinished: dict[int, tuple[torch.Tensor, int]] = {}  # tensors, and how many of their bytes are missing
        self._empty = deque(tensor for tensor in plan.tensors if not tensor.layout.payload_nbytes)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._empty:
            one = self._empty.popleft()
            return one.name, _new(one)
        try:
            while True:
                # One expression: a variable would hold the slot of a piece while the next one is waited for.
                made = self._made(*next(self._pieces))
                if made is not None:
                    return made
        except (TransportError, PoolError, ArenaError, StopIteration):
            self.close()
            raise

    def close(self) -> None:
        """Stop the downloads. Tensors that were handed out stay valid. Idempotent."""
        self._empty.clear()
        self._unfinished.clear()
        self._pieces = iter(())
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_stack"):
            with contextlib.suppress(TransportError):  # a local file has changed; here nobody can be told
                self._stack.close()

    def _made(self, source: str, index: int, view: memoryview) -> tuple[str, torch.Tensor] | None:
        """Return the tensor that a range completes, with its name; None if it completes none."""
        number, start = self._plan.places[source][index]
        one = self._plan.tensors[number]
        if one.may_view:
            return one.name, self._viewed(one, view)
        if number not in self._unfinished:
            self._unfinished[number] = _new(one), one.layout.payload_nbytes
        target, missing = self._unfinished.pop(number)
        _copy_piece(one, target, start, view)
        if missing == len(view):
            return one.name, target
        self._unfinished[number] = target, missing - len(view)
        return None

    def _viewed(self, one: _Streamed, view: memoryview) -> torch.Tensor:
        flat = torch.frombuffer(view, dtype=torch.uint8)
        # A header of an odd length puts elements where they are not aligned.
        if flat.data_ptr() % one.layout.dtype.itemsize or not HELD_SLOTS.try_hold(view, self._max_held_bytes):
            flat = _copied(view)
        return flat.view(one.layout.dtype).view(one.layout.size)


def _new(one: _Streamed) -> torch.Tensor:
    with unfilled_memory():
        return torch.empty(one.layout.size, dtype=one.dtype, device=one.device)


def _copied(view: memoryview) -> torch.Tensor:
    """Return the bytes in memory of their own.

    numpy copies them, since torch may do it by threads, which don't survive a fork of the program.
    """
    with unfilled_memory():
        flat = torch.empty(len(view), dtype=torch.uint8, device="cpu")
    np.copyto(flat.numpy(), np.frombuffer(view, np.uint8))
    return flat


def _copy_piece(one: _Streamed, target: torch.Tensor, start: int, view: memoryview) -> None:
    """Copy bytes of a stored tensor, of which the first one is byte ``start``, into the new tensor."""
    piece = torch.frombuffer(view, dtype=torch.uint8)
    if one.dtype == one.layout.dtype:
        target.view(-1).view(torch.uint8)[start : start + len(view)].copy_(piece)
        return
    itemsize = one.layout.dtype.itemsize
    if piece.data_ptr() % itemsize:
        piece = piece.clone()
    first = start // itemsize
    target.view(-1)[first : first + len(view) // itemsize].copy_(piece.view(one.layout.dtype))
