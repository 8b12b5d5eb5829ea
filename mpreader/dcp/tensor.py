"""Copier of a stored tensor, or of a box of it, into a target tensor; checks the CRC of the bytes on the way.

The loader of items uses it for every item of a load. The bytes of an item come in pieces. A piece may be a slot of
shared memory, and the next piece may be received only when that slot is free again. So no code here may hold a
reference to a piece when it asks for the next one; otherwise the load would wait for itself.

A *box* is a range of indices in each dimension. There are three ways to copy one:

* Same dtype, and the bytes of the box are contiguous in the storage and in the target: they are copied piece by piece.
* The tensor fills its storage without gaps: blocks of rows, of at most 512 KiB, are gathered, converted and copied.
* The tensor has gaps or repeated elements (a slice of a larger storage, an expanded tensor): the whole storage is
  gathered.

The first two take a bounded amount of memory, however large the tensor is, wherever the item is cut into pieces, and
whatever strides, dtype and device the target has. Where no CRC is checked, they read no byte outside of the runs of
:mod:`mpreader.formats.selection`, so that only these need be there. A target of a subclass of Tensor takes as much
memory more as the box has.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Final

import numpy as np
import torch

from mpreader.dcp.new_memory import unfilled_memory
from mpreader.errors import PlanError
from mpreader.formats.crc import crc32
from mpreader.formats.layout import TensorLayout
from mpreader.formats.selection import Box, box_of, contiguous_order, index_in_memory
from mpreader.formats.torch_save import ItemBytes, RecordCorrupted, read_payload_crc

__all__ = ["check_archive", "copy_into", "load_whole"]

# Computing the CRC reads a block, and copying reads it again: a block of this size is then still in the processor's own
# cache (1 MiB or more). A larger block would be slower to copy, too: the C library would read the target first. Nor may
# it be larger than the largest gap within a run: rows of a block are read with the gaps between their parts of the box.
_BLOCK_NBYTES: Final = 512 * 1024


def copy_into(
    item: ItemBytes,
    layout: TensorLayout,
    target: torch.Tensor,
    offsets: Sequence[int] = (),
    lengths: Sequence[int] = (),
    *,
    verify: bool = True,
) -> bool:
    """Copy the box at ``offsets`` of the stored tensor into ``target``, converting dtype and device as needed.

    Args:
        item: The record that ``layout`` was decoded from.
        layout: Layout of the tensor in it.
        target: A tensor of exactly the box's shape; not a leaf that requires grad.
        offsets: First index of the box in each dimension, outermost first; further dimensions are taken whole.
        lengths: Length of the box in each dimension, in elements, outermost first. As in DCP, a length that is not less
            than the stored dimension takes all of it.
        verify: True checks the CRC of the whole stored tensor, the bytes outside of the box included. False reads no
            more than the runs of the box.

    Returns:
        True if the bytes, if there are any, were compared with a CRC.

    Raises:
        PlanError: The box is not inside of the stored tensor, or ``target`` has another shape.
        RecordCorrupted: The bytes don't match their CRC. They were copied before that was known, so the contents of
            ``target`` must not be used.
    """
    box = box_of(layout.size, offsets, lengths)
    if tuple(target.shape) != tuple(length for _, length in box):
        raise PlanError(f"a box of shape {[length for _, length in box]} can't be read into {list(target.shape)}")
    payload = _Payload(item, layout, verify)
    if target.numel():
        _copy_box(payload, layout, box, target)
    return payload.finish()


def load_whole(item: ItemBytes, *, verify: bool = True) -> tuple[torch.Tensor, bool]:
    """Load any record with ``torch.load(weights_only=True)``; takes memory for the whole item.

    Returns:
        The tensor, and True if the bytes were compared with CRCs.

    Raises:
        RecordCorrupted: An entry of the record doesn't match its CRC, or the record can't be read.
        pickle.UnpicklingError: The record needs a class that ``weights_only`` does not allow.
    """
    record = io.BytesIO(item.view(0, item.size))
    is_verified = verify and check_archive(record)
    try:
        # torch.load makes some kinds of tensors on the default device, whatever map_location says.
        with torch.device("cpu"), unfilled_memory():
            loaded: torch.Tensor = torch.load(record, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise  # the record isn't damaged, and torch's message says what to do
    except Exception as error:
        # The CRCs were right, but no CRC covers the headers and the directory, and torch reads them in another way than
        # zipfile does: damage there is first noticed here.
        raise RecordCorrupted(f"torch.load can't read it: {error}") from error
    return loaded, is_verified


def check_archive(record: io.BytesIO) -> bool:
    """Check the CRC of every entry of an archive.

    Args:
        record: A record of ``torch.save``; its position is at the start before and after. A record that is not a zip
            archive has no checksums, so it is not checked.

    Returns:
        True if there were CRCs to check.

    Raises:
        RecordCorrupted: An entry doesn't match its CRC, or the archive is not complete.
    """
    # The first bytes count, too: is_zipfile looks for the directory at the end, which a damaged archive may lack.
    is_archive = bytes(record.getbuffer()[:4]) == b"PK\x03\x04" or zipfile.is_zipfile(record)
    record.seek(0)
    if not is_archive:
        return False
    try:
        with zipfile.ZipFile(record) as archive:
            # torch.save without checksums writes a CRC of 0 for every entry.
            has_crc = any(entry.CRC for entry in archive.infolist())
            broken = archive.testzip() if has_crc else None
    except Exception as error:  # for damaged bytes zipfile raises a dozen types of errors
        raise RecordCorrupted(f"not a whole torch.save record: {error}") from error
    if broken is not None:
        raise RecordCorrupted(f"{broken} of a torch.save record doesn't match its CRC-32")
    record.seek(0)
    return has_crc


class _Payload:
    """Bytes of a tensor's storage, read once and in ascending order, so that a large item is never held as a whole.

    If the CRC is to be checked, all bytes are read. Otherwise only those that are requested are read.
    """

    def __init__(self, item: ItemBytes, layout: TensorLayout, verify: bool) -> None:
        self._item = item
        self._layout = layout
        self._verify = verify
        self._with_crc = verify and layout.has_crc
        self._crc = 0  # of the bytes before the position
        self._position = 0  # end of what was read, in the payload

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """Returns the bytes ``[start, end)`` of the payload, in blocks.

        ``start`` must not be before the last ``end``. The caller takes all blocks before the next call: the position is
        already moved here, and the CRC of a block is computed when the block is taken.
        """
        self._skip_to(start)
        self._position = end
        return self._checked(start, end)

    def gather(self, start: int, end: int, needed: tuple[int, int] | None = None) -> torch.Tensor:
        """Returns a copy of the bytes ``[start, end)``, aligned for every dtype; the payload itself may not be.

        Only the bytes ``needed``, counted from ``start``, are read into it; None: all of them.
        """
        first, stop = needed or (0, end - start)
        # The device is named because the user may have set another default one, even "meta", which holds no bytes.
        buffer = torch.empty(end - start, dtype=torch.uint8, device="cpu")
        _fill(buffer[first:stop], self.blocks(start + first, start + stop))
        return buffer

    def finish(self) -> bool:
        """Read the rest of the payload and compare its CRC, if it is to be checked; returns True if it was compared.

        Raises:
            RecordCorrupted: The CRC is not the one that was saved, or the payload is not followed by its descriptor.
        """
        if not self._verify:
            return False
        if not self._layout.payload_nbytes:  # no bytes, and no descriptor behind them; the front's CRCs were compared
            return self._layout.has_crc
        self._skip_to(self._layout.payload_nbytes)
        saved = read_payload_crc(self._item, self._layout)
        if saved is not None and saved != self._crc:
            raise RecordCorrupted(f"a tensor's bytes have CRC-32 {self._crc:08x}, saved was {saved:08x}")
        return saved is not None

    def _skip_to(self, start: int) -> None:
        """Add the bytes up to ``start`` to the CRC, if it is to be checked."""
        if self._with_crc and self._position < start:
            _drain(self._checked(self._position, start))

    def _checked(self, start: int, end: int) -> Iterator[memoryview]:
        """Returns the blocks of the bytes ``[start, end)``, each added to the CRC when it is asked for."""
        first = self._layout.payload_offset
        pieces = self._item.pieces(first + start, first + end)
        # Iterators rather than loops: the variable of a loop would hold a piece until the next one has come, and so
        # keep the slot that the next one may need.
        if not self._with_crc:
            return pieces
        return map(self._add_to_crc, chain.from_iterable(map(_cut, pieces)))

    def _add_to_crc(self, block: memoryview) -> memoryview:
        self._crc = crc32(block, self._crc)
        return block


def _cut(piece: memoryview) -> Iterable[memoryview]:
    """Returns the piece in blocks."""
    if len(piece) <= _BLOCK_NBYTES:  # most pieces, so this spares them a generator
        return (piece,)
    return (piece[start : start + _BLOCK_NBYTES] for start in range(0, len(piece), _BLOCK_NBYTES))


def _drain(blocks: Iterable[object]) -> None:
    """Take all ``blocks``; unlike a loop, this holds no block while it asks for the next one."""
    deque(blocks, maxlen=0)


def _fill(target: torch.Tensor, blocks: Iterator[memoryview]) -> None:
    """Fill a flat uint8 tensor.

    Raises:
        RecordCorrupted: There are fewer bytes than the tensor has.
    """
    # numpy's copy releases the GIL, which the pool's threads need; an assignment to a memoryview would not. torch's
    # copy_ releases it, too, but may spread the work over its threads, and wait for them on cores that are busy
    # receiving.
    array = target.numpy() if target.is_cpu else None
    position = 0

    # A function for _drain to call, in place of the body of a loop: a block is released when it returns.
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


def _copy_box(payload: _Payload, layout: TensorLayout, box: Box, target: torch.Tensor) -> None:
    """Copy a box into a target of its shape, in the cheapest of the three ways that the module's docstring lists."""
    if type(target) is not torch.Tensor:
        # A subclass may override copy_, so it must be filled by one call of its copy_ with all elements.
        plain = torch.empty(target.shape, dtype=layout.dtype, device="cpu")
        if type(plain) is not torch.Tensor:  # it would have to be filled in the same way, and so on
            raise PlanError(f"torch makes tensors of type {type(plain).__name__} here: load outside of such a mode")
        _copy_box(payload, layout, box, plain)
        target.copy_(plain)
        return
    order = contiguous_order(layout.size, layout.stride)
    if order is None:
        _copy_gathered(payload, layout, box, target)
        return
    # With the dimensions in the order of memory, the stored tensor is contiguous. Box and target are permuted alike, so
    # that their elements still correspond.
    size = tuple(layout.size[dim] for dim in order)
    box = tuple(box[dim] for dim in order)
    if order != tuple(range(len(order))):  # most tensors are in this order already: small ones load faster without it
        target = target.permute(order)
    first = layout.storage_offset * layout.dtype.itemsize
    # A scalar has no dimension; here it becomes a tensor of one row.
    _copy_contiguous(payload, layout.dtype, first, size or (1,), box or ((0, 1),), target if size else target[None])


def _copy_contiguous(
    payload: _Payload, dtype: torch.dtype, first: int, size: tuple[int, ...], box: Box, target: torch.Tensor
) -> None:
    """Copy a box of a contiguous tensor; see :func:`_copy_rows` for the arguments."""
    run_start = index_in_memory(size, box)
    if run_start is not None and target.dtype == dtype and _is_plain(target):
        start = first + run_start * dtype.itemsize
        # as_strided, since view(-1) would keep the odd stride that a dimension of length 1 may have, and then a view as
        # bytes fails.
        flat = target.as_strided((target.numel(),), (1,)).view(torch.uint8)
        _fill(flat, payload.blocks(start, start + len(flat)))
    else:
        _copy_rows(payload, dtype, first, size, box, target)


def _copy_gathered(payload: _Payload, layout: TensorLayout, box: Box, target: torch.Tensor) -> None:
    """Copy a box of a tensor of any strides; takes memory for the whole storage."""
    storage = payload.gather(0, layout.payload_nbytes)
    stored = storage.view(layout.dtype).as_strided(layout.size, layout.stride, layout.storage_offset)
    for dim, (start, length) in enumerate(box):
        stored = stored.narrow(dim, start, length)
    target.copy_(stored)


def _is_plain(target: torch.Tensor) -> bool:
    """Returns True if bytes can be copied straight into the target's memory.

    The memory of a conjugated or negated view holds other values than the view shows.
    """
    return target.is_contiguous() and not target.is_conj() and not target.is_neg()


def _copy_rows(
    payload: _Payload, dtype: torch.dtype, first: int, size: tuple[int, ...], box: Box, target: torch.Tensor
) -> None:
    """Copy a box of a contiguous tensor, some rows (indices of the first dimension) at a time.

    Args:
        payload: The storage.
        dtype: Element type of the tensor.
        first: Position of the tensor's first byte in the payload.
        size: Shape of the tensor, of at least one dimension.
        box: The box.
        target: Tensor of the box's shape.
    """
    row_nbytes = math.prod(size[1:]) * dtype.itemsize
    start, length = box[0]
    # A row that is too large to be gathered is copied by itself, straight into the target where that is possible.
    if row_nbytes > _BLOCK_NBYTES and len(size) > 1:
        for row in range(length):
            _copy_contiguous(payload, dtype, first + (start + row) * row_nbytes, size[1:], box[1:], target[row])
        return
    rows_at_once = max(1, _BLOCK_NBYTES // row_nbytes)
    # Bytes before the first element of the box in the first row, and up to the end of its last element in the last one.
    before, row_end = _span_in_row(size[1:], box[1:], dtype.itemsize)
    for done in range(0, length, rows_at_once):
        count = min(rows_at_once, length - done)
        at = first + (start + done) * row_nbytes
        needed = before, (count - 1) * row_nbytes + row_end
        rows = payload.gather(at, at + count * row_nbytes, needed).view(dtype).view(count, *size[1:])
        for dim, (offset, wanted) in enumerate(box[1:], start=1):
            rows = rows.narrow(dim, offset, wanted)
        target.narrow(0, done, count).copy_(rows)


def _span_in_row(size: Sequence[int], box: Box, itemsize: int) -> tuple[int, int]:
    """Returns the first byte of a box's part of one row, and the end of the last one, counted from the row's start."""
    first = last = 0  # elements
    step = 1
    for whole, (offset, length) in zip(reversed(size), reversed(box), strict=True):
        first += offset * step
        last += (offset + length - 1) * step
        step *= whole
    return first * itemsize, (last + 1) * itemsize
