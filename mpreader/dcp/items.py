"""Loader of the items of a load plan: copies each item from its file into the target that DCP's planner has for it.

The storage reader uses it where the multiprocess constructor makes the readers of the files: those readers give access
to an item's bytes without copying them. A tensor is decoded from these bytes, without ``torch.load``::

    reader.item ──> decode_layout ──> planner.resolve_tensor ──> copy_into (checks the CRC) ──> planner.commit_tensor
                        └ None: torch.load, after a check of its CRCs

Of a raw item, which has no record around it, the layout is known, and nothing can be checked.

Of some items only the bytes of a box were requested, by what the plan expects of their records. The front of the record
tells if it was right. If it was not, no byte is copied: the item is returned, with what is to be read of it instead.

If bytes contradict their CRC, the item is received a second time. If these bytes are damaged, too, the load ends in a
``ChecksumMismatch`` that names the item. This module must not ask S3 for anything itself.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from mpreader.dcp.planned import PlannedItem, RawItem
from mpreader.dcp.tensor import check_archive, copy_into, load_whole
from mpreader.errors import ArenaError, ChecksumMismatch, PlanError, PoolError, TransportError
from mpreader.formats.layout import TensorLayout
from mpreader.formats.selection import Run, Selection, box_of, stored_runs
from mpreader.formats.torch_save import BufferItem, ItemBytes, RecordCorrupted, decode_layout
from mpreader.readers.protocols import StoredItem
from mpreader.s3 import parse_s3_uri

__all__ = ["ItemLoader", "ItemReader", "LoadedBytes", "SelectedBytes"]


log = logging.getLogger(__name__)


class ItemReader(Protocol):
    """Reader of a file that gives access to the bytes of an item without copying them (``MultiprocessS3Reader``)."""

    def item(self, offset: int, length: int) -> ItemBytes:
        """Returns the item of ``length`` bytes that begins at byte ``offset`` of the file."""

    def refetch(self, offset: int, length: int) -> ItemBytes:
        """Returns the same item as :meth:`item`, received once more."""

    def selected_item(self, offset: int, length: int, first: int) -> SelectedBytes:
        """Returns an item of which only parts were received; ``first`` is the first byte of it that will be read."""


class SelectedBytes(ItemBytes, Protocol):
    """Bytes of an item of which only parts were received. They are read in ascending order."""

    def holds(self, start: int, end: int) -> bool:
        """Returns True if all bytes [start, end) can be read; there must be at least one."""


class LoadedBytes:
    """Counters of the bytes that an :class:`ItemLoader` has loaded.

    Attributes:
        verified: Bytes of items whose checksum was compared.
        unverified: Bytes of the other items; of a box, its own bytes. Items that another rank verifies are counted
            there.
        over_read: Bytes within the runs of boxes that the boxes don't need.
    """

    def __init__(self) -> None:
        self.verified = 0
        self.unverified = 0
        self.over_read = 0

    def count(self, item: PlannedItem, nbytes: int, *, is_verified: bool) -> None:
        """Count bytes of an item."""
        if not item.check.is_own:
            return
        if is_verified:
            self.verified += nbytes
        else:
            self.unverified += nbytes


def _nothing() -> None:
    pass


class ItemLoader:
    """Loads items into the targets of one planner, one after the other.

    Args:
        planner: Returns the target of each tensor, and takes the bytes of other items.
        transforms: Undoes the extensions of the save, such as compression. None if torch is too old for extensions.
        verify: True checks the CRC-32s that ``torch.save`` wrote.
        loaded: Counts what was loaded.
        check_held: For a read that the ranks of a host share: called before an item is committed, and raises if what
            was copied may have been overwritten meanwhile.

    Raises:
        PlanError: A mode of torch is active in which new tensors have no bytes, such as ``FakeTensorMode``.
    """

    def __init__(
        self,
        planner: LoadPlanner,
        transforms: Any,
        *,
        verify: bool,
        loaded: LoadedBytes,
        check_held: Callable[[], None] | None = None,
    ) -> None:
        # Once for each load rather than for each item, since a load is not left between its items.
        made = type(torch.empty(0, device="cpu"))
        if made is not torch.Tensor:
            raise PlanError(f"a mode of torch makes a {made.__name__} of each tensor: load outside of that mode")
        self._planner = planner
        self._transforms = transforms
        self._verify = verify
        self._loaded = loaded
        self._check_held = check_held or _nothing
        self._is_shared = check_held is not None
        # Several boxes of one item may be wanted, one after the other: the front is read for the first of them.
        self._last_layout: tuple[str, int, TensorLayout] | None = None  # URI and offset of the item

    def leave_host(self) -> None:
        """Note that what follows is received by this rank alone."""
        self._check_held, self._is_shared = _nothing, False

    def load(self, item: PlannedItem, uri: str, reader: ItemReader) -> PlannedItem | None:
        """Load an item.

        Args:
            item: The item.
            uri: URI of its file.
            reader: Reader of that file.

        Returns:
            None if it was loaded; otherwise what has to be received of the item in place of its selection, since its
            record is not as it was expected. That will be right.

        Raises:
            ChecksumMismatch: The item's bytes don't match their CRC-32, also when received again.
            PlanError: The target has another shape than what is to be read into it.
            TransportError: The bytes could not be received; the error names the item.
            PoolError: The worker pool has failed; the error names the item.
            ArenaError: Shared memory is used up; the error names the item.
        """
        try:
            if item.selection is not None:
                return self._load_selected(item, item.selection, uri, reader)
            return self._load_checked(item, uri, reader)
        except ChecksumMismatch:
            raise  # a TransportError that names the item already
        except (TransportError, PoolError, ArenaError) as error:
            # The copy takes the place of the original, so it keeps the original's cause.
            raise error.needed_for(item.request.storage_index.fqn) from error.__cause__
        except Exception:
            self._check_held()  # or the record of another item has come into the memory, and was taken for this one
            raise

    def _load_selected(
        self, item: PlannedItem, selection: Selection, uri: str, reader: ItemReader
    ) -> PlannedItem | None:
        """Load a box whose bytes were selected; returns what to receive instead if they are the wrong ones."""
        stored, request = item.stored, item.request
        layout = item.layout or _raw_layout(stored) or self._known_layout(uri, stored)
        first = 0 if layout is None else selection.runs[0].start
        content = reader.selected_item(stored.offset, stored.length, first)
        if layout is None:
            layout = _read_layout(content, selection.front_nbytes)
            self._check_held()  # before the layout, which may be that of another item, is believed
            if layout is None:
                return PlannedItem(request, stored)
            self._last_layout = uri, stored.offset, layout
        runs = _runs_of(layout, request, selection.max_gap_bytes)
        if runs is None:
            return PlannedItem(request, stored)
        if not all(content.holds(run.start, run.end) for run in runs):
            return PlannedItem(request, stored, Selection(0, runs, selection.max_gap_bytes), layout)
        target = self._planner.resolve_tensor(request).detach()
        copy_into(content, layout, target, request.storage_offsets, request.lengths, verify=False)
        self._check_held()
        self._planner.commit_tensor(request, target)
        nbytes = request.lengths.numel() * layout.dtype.itemsize
        self._loaded.count(item, nbytes, is_verified=False)
        self._loaded.over_read += sum(run.size for run in selection.runs) - nbytes
        return None

    def _known_layout(self, uri: str, stored: StoredItem) -> TensorLayout | None:
        if self._last_layout is not None and self._last_layout[:2] == (uri, stored.offset):
            return self._last_layout[2]
        return None

    def _load_checked(self, item: PlannedItem, uri: str, reader: ItemReader) -> PlannedItem | None:
        offset, length = item.stored.offset, item.stored.length
        try:
            self._load_into_target(item, reader.item(offset, length))
        except RecordCorrupted as error:
            self._check_held()  # or the bytes of another item have come into the memory meanwhile
            if self._is_shared:  # other ranks may have the damaged bytes in their hands, too: this one reads its own
                log.debug("%r is damaged, as all ranks of this host see it: %s", item.request.storage_index.fqn, error)
                return PlannedItem(item.request, item.stored)
            # Bits may have flipped on the way, and then a second download is right. If they have flipped in the bucket,
            # it brings the same damage.
            try:
                self._load_into_target(item, reader.refetch(offset, length))
            except RecordCorrupted as error:
                raise _mismatch(item, uri, error) from error
        return None

    def _load_into_target(self, item: PlannedItem, stored_bytes: ItemBytes) -> None:
        """Decode an item and hand it to the planner, by the same calls that torch's own reader makes.

        Raises:
            RecordCorrupted: The bytes contradict a checksum.
        """
        request = item.request
        content = self._transformed(item, stored_bytes)
        layout = _raw_layout(item.stored)
        verify = self._verify and item.check.is_own and layout is None
        if request.type == LoadItemType.BYTE_IO:
            value = io.BytesIO(content.view(0, content.size))
            is_verified = verify and check_archive(value)
            self._check_held()
            self._planner.load_bytes(request, value)
            self._loaded.count(item, item.stored.length, is_verified=is_verified)
            return
        layout = layout or decode_layout(content)
        if layout is not None:
            target = self._planner.resolve_tensor(request).detach()  # autograd refuses copies into a leaf
            is_verified = copy_into(content, layout, target, request.storage_offsets, request.lengths, verify=verify)
        else:
            loaded, is_verified = load_whole(content, verify=verify)
            loaded = narrow_tensor_by_index(loaded, request.storage_offsets, request.lengths)
            target = self._planner.resolve_tensor(request).detach()
            _check_shape(loaded, target)  # copy_ would broadcast a smaller tensor
            target.copy_(loaded)
        self._check_held()
        self._planner.commit_tensor(request, target)
        self._loaded.count(item, item.stored.length, is_verified=is_verified)

    def _transformed(self, item: PlannedItem, stored_bytes: ItemBytes) -> ItemBytes:
        """Returns the item as it was before the extensions of the save."""
        descriptors = getattr(item.stored, "transform_descriptors", None)  # older torch has no such attribute
        if not descriptors:
            return stored_bytes
        raw = io.BytesIO(stored_bytes.view(0, stored_bytes.size))  # extensions take a file, so the bytes are copied
        stream = self._transforms.transform_load_stream(item.request, descriptors, raw)
        try:
            return BufferItem(bytearray(stream.read(-1)))  # writable, as an item's bytes must be
        except Exception as error:  # each extension raises errors of its own types for damaged bytes
            raise RecordCorrupted(f"{', '.join(descriptors)} can't read it: {error}") from error


def _raw_layout(stored: StoredItem) -> TensorLayout | None:
    return stored.layout if isinstance(stored, RawItem) else None


def _read_layout(content: SelectedBytes, front_nbytes: int) -> TensorLayout | None:
    """Read the front; returns None if it is damaged or not understood: then all of the item is needed."""
    try:
        return decode_layout(content, front_nbytes)
    except RecordCorrupted:
        return None


def _runs_of(layout: TensorLayout, request: ReadItem, max_gap_bytes: int) -> tuple[Run, ...] | None:
    """Returns what the box of a request needs of its record; None: all of it."""
    box = box_of(layout.size, request.storage_offsets, request.lengths)
    runs = stored_runs(layout.size, layout.stride, layout.storage_offset, layout.dtype.itemsize, box, max_gap_bytes)
    if not runs:
        return None
    return tuple(Run(run.start + layout.payload_offset, run.end + layout.payload_offset) for run in runs)


def _mismatch(item: PlannedItem, uri: str, error: RecordCorrupted) -> ChecksumMismatch:
    bucket, key = parse_s3_uri(uri)
    start, end = item.stored.offset, item.stored.offset + item.stored.length
    return ChecksumMismatch(
        f"{item.request.storage_index.fqn!r} is damaged in {uri}, bytes {start}-{end}, also when received again: "
        f"{error}. Restore the file, or load from another checkpoint; verify=False does not check tensors",
        bucket=bucket,
        key=key,
        range=(start, end),
        attempts=2,
    )


def _check_shape(loaded: torch.Tensor, target: torch.Tensor) -> None:
    if loaded.size() != target.size():
        raise PlanError(f"a box of shape {list(loaded.size())} can't be read into {list(target.size())}")
