"""Copier of a stored tensor, or of a box of it, into a target tensor; checks the CRC of the bytes as they pass.

The storage reader uses it for every item of a load. A piece of an item may be a slot of shared memory that the next
piece is waiting for, so nothing here refers to a piece when the next one is asked for.

Memory stays bounded for every tensor that fills its storage without gaps, however large it is, wherever the
item is cut into pieces, and whatever the target's strides, dtype and device are:

* Same dtype, and the wanted bytes lie in one run in both: bytes are copied piece by piece.
* Otherwise, rows of at most 512 KiB are gathered, converted and copied.

Only a tensor with gaps or repeated elements (a slice of a larger storage, an expanded tensor) is gathered whole.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Final

import numpy as np
import torch

from mpreader.dcp.crc import crc32
from mpreader.dcp.layout import TensorLayout
from mpreader.dcp.record import ItemBytes, RecordCorrupted, read_payload_crc
from mpreader.errors import PlanError

__all__ = ["check_archive", "copy_into", "load_whole"]

# A block is still in the processor's own cache (1 MiB or more) when it is copied after its CRC was computed; and the C
# library copies blocks smaller than that cache without reading the target first.
_BLOCK_NBYTES: Final = 512 * 1024

Box = tuple[tuple[int, int], ...]  # (start, length) of each dimension


def copy_into(
    item: ItemBytes,
    layout: TensorLayout,
    target: torch.Tensor,
    offsets: Sequence[int] = (),
    lengths: Sequence[int] = (),
    *,
    verify: bool = True,
) -> None:
    """Copy the box at ``offsets`` of the stored tensor into ``target``, converting dtype and device as needed.

    Args:
        item: The record that ``layout`` was decoded from.
        layout: Layout of the tensor in it.
        target: A tensor of exactly the box's shape; not a leaf that requires grad.
        offsets: First index of the box in each dimension; dimensions left out are taken whole.
        lengths: Length of the box in each dimension. As in DCP, a length that is not less than the stored
            dimension takes all of it.
        verify: True checks the CRC of the whole stored tensor, the bytes outside of the box included.

    Raises:
        PlanError: The box is not inside of the stored tensor, or ``target`` has another shape.
        RecordCorrupted: The bytes don't match their CRC. ``target`` then holds garbage.
    """
    box = _box(layout.size, offsets, lengths)
    if tuple(target.shape) != tuple(length for _, length in box):
        raise PlanError(f"a box of shape {[length for _, length in box]} can't be read into {list(target.shape)}")
    payload = _Payload(item, layout, verify)
    if target.numel():
        _copy_box(payload, layout, box, target)
    payload.finish()


def load_whole(item: ItemBytes, *, verify: bool = True) -> torch.Tensor:
    """Load any record with ``torch.load(weights_only=True)``; holds the whole item in memory.

    Raises:
        RecordCorrupted: An entry of the record doesn't match its CRC, or the record can't be read.
        pickle.UnpicklingError: The record needs a class that ``weights_only`` does not allow.
    """
    record = io.BytesIO(item.view(0, item.size))
    if verify:
        check_archive(record)
    try:
        loaded: torch.Tensor = torch.load(record, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise  # torch's message says what to do about it
    except Exception as error:
        # No CRC covers the archive's headers and directory, and torch reads them in another way than zipfile does.
        raise RecordCorrupted(f"torch.load can't read it: {error}") from error
    return loaded


def check_archive(record: io.BytesIO) -> None:
    """Check the CRC of all that an archive holds, and leave it at its start; what is no archive has no checksums.

    Raises:
        RecordCorrupted: An entry doesn't match its CRC, or something of the archive is missing.
    """
    is_archive = bytes(record.getbuffer()[:4]) == b"PK\x03\x04" or zipfile.is_zipfile(record)
    record.seek(0)
    if not is_archive:
        return
    try:
        with zipfile.ZipFile(record) as archive:
            has_crc = any(entry.CRC for entry in archive.infolist())
            broken = archive.testzip() if has_crc else None
    except Exception as error:  # zipfile answers garbage with a dozen types
        raise RecordCorrupted(f"not a whole torch.save record: {error}") from error
    if broken is not None:
        raise RecordCorrupted(f"{broken} of a torch.save record doesn't match its CRC-32")
    record.seek(0)


class _Payload:
    """Bytes of a tensor's storage, read once and in ascending order, so that a large item need not be held.

    With a CRC to be checked every byte passes, wanted or not; without one the others are not even asked for.
    """

    def __init__(self, item: ItemBytes, layout: TensorLayout, verify: bool) -> None:
        self._item = item
        self._layout = layout
        self._verify = verify and layout.payload_nbytes > 0
        self._with_crc = self._verify and layout.has_crc
        self._crc = 0
        self._position = 0

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """Returns the bytes ``[start, end)`` of the payload, in blocks; the caller must take all of them.

        ``start`` must not be before the last ``end``.
        """
        self._skip_to(start)
        self._position = end
        return self._checked(start, end)

    def gather(self, start: int, end: int) -> torch.Tensor:
        """Returns a copy of the bytes ``[start, end)``, aligned for any dtype, as the payload itself need not be."""
        buffer = torch.empty(end - start, dtype=torch.uint8)
        _fill(buffer, self.blocks(start, end))
        return buffer

    def finish(self) -> None:
        """Compare the CRC, if it is to be checked.

        Raises:
            RecordCorrupted: It is not the one that was saved.
        """
        if not self._verify:
            return
        self._skip_to(self._layout.payload_nbytes)
        saved = read_payload_crc(self._item, self._layout)
        if saved is not None and saved != self._crc:
            raise RecordCorrupted(f"a tensor's bytes have CRC-32 {self._crc:08x}, saved was {saved:08x}")

    def _skip_to(self, start: int) -> None:
        """Add the bytes up to ``start`` to the CRC, if it is to be checked."""
        if self._with_crc and self._position < start:
            _drain(self._checked(self._position, start))

    def _checked(self, start: int, end: int) -> Iterator[memoryview]:
        """Returns the blocks of the bytes ``[start, end)``, each added to the CRC when it is asked for."""
        first = self._layout.payload_offset
        pieces = self._item.pieces(first + start, first + end)
        # Iterators rather than loops: a variable of a loop would hold a piece until the next one has come.
        blocks = chain.from_iterable(map(_cut, pieces))
        return map(self._add_to_crc, blocks) if self._with_crc else blocks

    def _add_to_crc(self, block: memoryview) -> memoryview:
        self._crc = crc32(block, self._crc)
        return block


def _cut(piece: memoryview) -> Iterable[memoryview]:
    if len(piece) <= _BLOCK_NBYTES:  # as most are
        return (piece,)
    return (piece[start : start + _BLOCK_NBYTES] for start in range(0, len(piece), _BLOCK_NBYTES))


def _drain(blocks: Iterable[object]) -> None:
    """Run through ``blocks``; unlike a loop over them, this holds none of them when the next one is asked for."""
    deque(blocks, maxlen=0)


def _fill(target: torch.Tensor, blocks: Iterator[memoryview]) -> None:
    """Fill a flat uint8 tensor."""
    # Like torch's copy_, numpy's lets go of the GIL, which the pool's threads need (assigning to a memoryview does
    # not); unlike torch's, it doesn't wait for a team of threads on cores that are busy receiving.
    array = target.numpy() if target.is_cpu else None
    position = 0

    def append(block: memoryview) -> None:
        nonlocal position
        end = position + len(block)
        if array is not None:
            np.copyto(array[position:end], np.frombuffer(block, np.uint8))
        else:
            target[position:end].copy_(torch.frombuffer(block, dtype=torch.uint8))
        position = end

    _drain(map(append, blocks))
    if position != len(target):
        raise RecordCorrupted(f"an item ended {len(target) - position} bytes early")


def _box(size: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> Box:
    """Returns the box that a plan item asks for, with one entry for every dimension of the stored tensor."""
    if len(offsets) != len(lengths) or len(offsets) > len(size):
        raise PlanError(f"offsets {list(offsets)} and lengths {list(lengths)} don't fit a tensor of {list(size)}")
    box = [(0, whole) for whole in size]
    for dim, (offset, length, whole) in enumerate(zip(offsets, lengths, size, strict=False)):
        if length < whole:  # else all of the dimension, as torch's narrow_tensor_by_index takes it
            box[dim] = (offset, length)
            if offset < 0 or length < 0 or offset + length > whole:
                raise PlanError(f"box at {list(offsets)} of {list(lengths)} is outside of a tensor of {list(size)}")
    return tuple(box)


def _copy_box(payload: _Payload, layout: TensorLayout, box: Box, target: torch.Tensor) -> None:
    # A subclass may have a copy_ of its own, and is to be filled through it, in one go.
    order = _memory_order(layout.size, layout.stride) if type(target) is torch.Tensor else None
    if order is None:
        _copy_gathered(payload, layout, box, target)
        return
    # With its dimensions in the order of memory, the source is contiguous; the target follows along.
    size = tuple(layout.size[dim] for dim in order)
    box = tuple(box[dim] for dim in order)
    if order != tuple(range(len(order))):  # a call of torch that most small tensors can do without
        target = target.permute(order)
    first = layout.storage_offset * layout.dtype.itemsize
    run = _one_run(size, box)
    if run is not None and target.dtype == layout.dtype and _is_plain(target):
        start = first + run * layout.dtype.itemsize
        # Not view(-1): that keeps the odd stride which a dimension of length 1 may have.
        flat = target.as_strided((target.numel(),), (1,)).view(torch.uint8)
        _fill(flat, payload.blocks(start, start + len(flat)))
    else:
        _copy_rows(payload, layout.dtype, first, size or (1,), box or ((0, 1),), target if size else target[None])


def _copy_gathered(payload: _Payload, layout: TensorLayout, box: Box, target: torch.Tensor) -> None:
    """Copy a box of any tensor; holds the whole storage in memory."""
    storage = payload.gather(0, layout.payload_nbytes)
    stored = storage.view(layout.dtype).as_strided(layout.size, layout.stride, layout.storage_offset)
    for dim, (start, length) in enumerate(box):
        stored = stored.narrow(dim, start, length)
    target.copy_(stored)


@lru_cache(maxsize=4096)  # the tensors of a checkpoint have few different shapes
def _memory_order(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """Returns the dimensions, outermost in memory first; None if the elements don't fill memory without gaps."""
    # The stride of a dimension of length 1 says nothing: such a dimension is left where it is, or put innermost.
    natural = range(len(size))
    by_stride = sorted(natural, key=lambda dim: (size[dim] == 1, -stride[dim]))
    for order in (tuple(natural), tuple(by_stride)):
        expected = 1
        for dim in reversed(order):
            if size[dim] != 1 and stride[dim] != expected:
                break
            expected *= size[dim]
        else:
            return order
    return None


def _one_run(size: tuple[int, ...], box: Box) -> int | None:
    """Returns the first element of the box if it is one run of a contiguous tensor; None if it is not."""
    start = 0
    for dim, (offset, length) in enumerate(box):
        start += offset * math.prod(size[dim + 1 :])
        # Every dimension inside of one that is longer than 1 must be taken whole.
        if length != 1 and box[dim + 1 :] != tuple((0, whole) for whole in size[dim + 1 :]):
            return None
    return start


def _is_plain(target: torch.Tensor) -> bool:
    """Returns True if the target's memory holds its elements in their order and as they are."""
    return target.is_contiguous() and not target.is_conj() and not target.is_neg()


def _copy_rows(
    payload: _Payload, dtype: torch.dtype, first: int, size: tuple[int, ...], box: Box, target: torch.Tensor
) -> None:
    """Copy a box of a contiguous tensor whose first byte is ``first``, some rows at a time."""
    row_nbytes = math.prod(size[1:]) * dtype.itemsize
    start, length = box[0]
    if row_nbytes > _BLOCK_NBYTES and len(size) > 1:  # a row is too large to be gathered: go one dimension down
        for row in range(length):
            _copy_rows(payload, dtype, first + (start + row) * row_nbytes, size[1:], box[1:], target[row])
        return
    rows_at_once = max(1, _BLOCK_NBYTES // row_nbytes)
    for done in range(0, length, rows_at_once):
        count = min(rows_at_once, length - done)
        at = first + (start + done) * row_nbytes
        rows = payload.gather(at, at + count * row_nbytes).view(dtype).view(count, *size[1:])
        for dim, (offset, wanted) in enumerate(box[1:], start=1):
            rows = rows.narrow(dim, offset, wanted)
        target.narrow(0, done, count).copy_(rows)
