"""Shared memory for received bytes: segments, cut into slots that are recycled last-in-first-out.

Touching fresh pages costs more than receiving the bytes, so a slot that was just given back (warm, perhaps still in
the processor's cache) is the first to be given out again. A slot given to a consumer is *leased*: the lease ends by
itself when the last reference to the view, or to anything made from it, is gone.

Segments are ``multiprocessing.shared_memory``, reserved in full when they are made (a full ``/dev/shm`` is an error
then, never a SIGBUS later) and unlinked at once, so that no crash leaves anything behind.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Final, cast

from mpreader.errors import ArenaError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Arena", "Segment", "Slot"]

log = logging.getLogger(__name__)

MIN_BLOCK_BYTES: Final = 64 * 1024
_MAX_SEGMENT_BYTES: Final = 1024 * 1024 * 1024
_PAGE_BYTES: Final = mmap.PAGESIZE


class Segment:
    """One piece of shared memory. It is unmapped when the segment and all views of it are gone.

    Attributes:
        number: What coordinator and workers call it.
        size: Bytes.
        fd: Descriptor to pass to the workers.
    """

    def __init__(self, number: int, size: int) -> None:
        """Make and reserve it.

        Raises:
            OSError: There is no room (ENOSPC), or no descriptor.
        """
        self.number = number
        self.size = size
        memory = SharedMemory(create=True, size=size)
        try:
            self.fd = os.open(f"/dev/shm/{memory.name}", os.O_RDWR | os.O_CLOEXEC)  # noqa: S108  # where shm_open puts it
        finally:
            memory.close()
            memory.unlink()
        try:
            os.posix_fallocate(self.fd, 0, size)
            # Not SharedMemory's own mapping: that one must be closed by hand, and fails while views exist.
            self.map = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Give back the descriptor; the memory goes when the last view goes."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Slot:
    """A contiguous piece of a segment, leased as a whole."""

    __slots__ = ("_array_reference", "nbytes", "offset", "order", "segment")

    def __init__(self, segment: Segment, offset: int, nbytes: int, order: int | None) -> None:
        self.segment = segment
        self.offset = offset
        self.nbytes = nbytes
        self.order = order  # log2 of its block's size over MIN_BLOCK_BYTES; None: the whole segment is its own
        self._array_reference: weakref.ref[object] | None = None

    def __repr__(self) -> str:
        return f"Slot(segment={self.segment.number}, offset={self.offset}, nbytes={self.nbytes})"

    def lease(self, on_end: Callable[[Slot], None]) -> memoryview:
        """A writable view of the slot.

        Args:
            on_end: Called once, from whatever thread drops the last reference to the view, to a slice of it, or to
                an array or tensor made from either; not called if the slot object itself is gone by then. It must
                not block or take a lock that this thread may hold.
        """
        import numpy as np

        # The array, not the view: slices of a view hold on to what is below it, and only that can be watched.
        array = np.frombuffer(self.segment.map, np.uint8, self.nbytes, self.offset)

        def end(_: weakref.ref[object]) -> None:
            self._array_reference = None
            on_end(self)

        self._array_reference = weakref.ref(array, end)
        return memoryview(cast("Buffer", array))


class Arena:
    """Allocates slots within a limit. Not thread-safe: owned by the coordinator's thread.

    A buddy allocator: blocks are powers of two times 64 KiB, up to ``block_bytes``. A larger slot gets a segment of
    its own, which lives as long as the slot.
    """

    def __init__(self, max_bytes: int, block_bytes: int, segment_bytes: int) -> None:
        """Make an empty arena; memory is reserved when it is first needed.

        Args:
            max_bytes: Most bytes to reserve at one time.
            block_bytes: Largest slot that shares a segment with others; a power of two times 64 KiB.
            segment_bytes: Size of a segment that is shared; a multiple of ``block_bytes``.
        """
        self.max_bytes = max_bytes
        self.reserved_bytes = 0
        self.segments: dict[int, Segment] = {}
        self._block_bytes = block_bytes
        self._segment_bytes = segment_bytes
        self._top_order = _order_of(block_bytes)
        self._made: list[Segment] = []
        self._dropped: list[Segment] = []
        # For each order the free blocks, newest last: popitem() gives the warmest.
        self._free: list[dict[tuple[int, int], None]] = [{} for _ in range(self._top_order + 1)]
        self._next_number = 0

    def __repr__(self) -> str:
        return f"Arena(reserved={self.reserved_bytes}, max={self.max_bytes}, segments={len(self.segments)})"

    def allocate(self, nbytes: int, *, beyond_limit: bool = False) -> Slot | None:
        """A slot of at least ``nbytes``; None if there is no room.

        Args:
            nbytes: Bytes needed, at least 1.
            beyond_limit: Go beyond ``max_bytes`` if need be.

        Raises:
            ArenaError: The host has no shared memory left, and the arena has none either.
        """
        if nbytes > self._block_bytes:
            size = -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
            self._drop_free_segments(size)
            segment = self._make_segment(size, beyond_limit)
            return None if segment is None else Slot(segment, 0, nbytes, None)
        order = _order_of(nbytes)
        block = self._pop_block(order)
        if block is None and self._add_shared_segment(beyond_limit):
            block = self._pop_block(order)
        return None if block is None else Slot(self.segments[block[0]], block[1], nbytes, order)

    def free(self, slot: Slot) -> None:
        """Take a slot back."""
        segment = slot.segment
        if slot.order is None:
            self._drop_segment(segment)
            return
        order, offset = slot.order, slot.offset
        while order < self._top_order:
            buddy = (segment.number, offset ^ (MIN_BLOCK_BYTES << order))
            if buddy not in self._free[order]:
                break
            del self._free[order][buddy]
            offset = min(offset, buddy[1])
            order += 1
        self._free[order][(segment.number, offset)] = None
        if self.reserved_bytes > self.max_bytes:
            self._drop_free_segments(0)

    def take_changes(self) -> tuple[list[Segment], list[Segment]]:
        """The segments made and those dropped since the last call, for the workers to map and to unmap."""
        changes = self._made, self._dropped
        self._made, self._dropped = [], []
        return changes

    def close(self) -> None:
        """Give back all that is not leased; leased memory goes with its last view."""
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()
        self.take_changes()
        for blocks in self._free:
            blocks.clear()
        self.reserved_bytes = 0

    def _pop_block(self, order: int) -> tuple[int, int] | None:
        for larger in range(order, self._top_order + 1):
            if self._free[larger]:
                (number, offset), _ = self._free[larger].popitem()
                for half in range(larger - 1, order - 1, -1):
                    self._free[half][(number, offset + (MIN_BLOCK_BYTES << half))] = None
                return number, offset
        return None

    def _add_shared_segment(self, beyond_limit: bool) -> bool:
        # A whole segment where it fits, else as many blocks as the limit allows.
        # Larger ones as the arena grows: each costs a descriptor, of which a process has perhaps 1024.
        room = (self.max_bytes - self.reserved_bytes) // self._block_bytes * self._block_bytes
        growth = min(self.reserved_bytes // 8, _MAX_SEGMENT_BYTES) // self._block_bytes * self._block_bytes
        size = min(max(self._segment_bytes, growth), room) if room > 0 else self._block_bytes
        segment = self._make_segment(size, beyond_limit)
        if segment is None:
            return False
        for offset in range(segment.size - self._block_bytes, -1, -self._block_bytes):
            self._free[self._top_order][(segment.number, offset)] = None
        return True

    def _make_segment(self, size: int, beyond_limit: bool) -> Segment | None:
        if self.reserved_bytes + size > self.max_bytes and not beyond_limit:
            return None
        try:
            segment = Segment(self._next_number, size)
        except OSError as error:
            self._go_on_without(size, error)
            return None
        self._next_number += 1
        self._made.append(segment)
        self.segments[segment.number] = segment
        self.reserved_bytes += size
        return segment

    def _go_on_without(self, size: int, error: OSError) -> None:
        if not self.segments:
            raise ArenaError(
                f"can't reserve {size} bytes of shared memory: {error.strerror}; /dev/shm has {_free_shm()} bytes "
                "free. Enlarge it (docker run --shm-size=1g) or lower PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
            ) from error
        log.warning("shared memory is short (%s): going on with %d bytes", error.strerror, self.reserved_bytes)
        self.max_bytes = self.reserved_bytes

    def _drop_free_segments(self, wanted: int) -> None:
        # Recycled slots that nobody uses now must not stand in the way of one large slot.
        free = self._free[self._top_order]
        for segment in list(self.segments.values()):
            if self.reserved_bytes + wanted <= self.max_bytes:
                return
            blocks = [(segment.number, offset) for offset in range(0, segment.size, self._block_bytes)]
            if all(block in free for block in blocks):
                for block in blocks:
                    del free[block]
                self._drop_segment(segment)

    def _drop_segment(self, segment: Segment) -> None:
        del self.segments[segment.number]
        self.reserved_bytes -= segment.size
        self._dropped.append(segment)
        segment.close()


def _order_of(nbytes: int) -> int:
    blocks = -(-max(nbytes, 1) // MIN_BLOCK_BYTES)
    return (blocks - 1).bit_length()


def _free_shm() -> int:
    with contextlib.suppress(OSError):
        status = os.statvfs("/dev/shm")  # noqa: S108  # asked about, not written to
        return status.f_bavail * status.f_frsize
    return 0
