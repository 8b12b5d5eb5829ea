"""Arena: shared memory for received bytes, in segments that are cut into slots, which are used again and again.

Touching fresh pages costs more than receiving the bytes. So the smallest hole that fits is used first, and of equal
ones the one that was freed last: its pages are warm, perhaps still in the processor's cache. The arena knows nothing of
reads, leases and callers: :mod:`mpreader.pool.coordinator.memory` keeps these accounts.

Segments are shared memory without a name, so that no crash leaves anything behind (:mod:`mpreader.shared_memory`). They
are reserved in full when they are made, and only out of memory that is free: a full host is an error then, never a
SIGBUS later, or the end of a process by the kernel's hand.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import posix
from typing import Final

from mpreader.errors import ArenaClosed, ArenaError
from mpreader.host import available_memory
from mpreader.pool.sizing import GRAIN_BYTES
from mpreader.shared_memory import (
    REFUSED,
    fill,
    free_shm,
    has_memfd,
    largest_file_bytes,
    naming,
    open_shared_memory,
    reserve,
)

__all__ = ["Arena", "Segment", "Slot"]

log = logging.getLogger(__name__)

_MAX_SEGMENT_BYTES: Final = 1024 * 1024 * 1024
_PAGE_BYTES: Final = mmap.PAGESIZE
# Memory that a segment leaves to the program, a quarter of what is free at most. Without it the kernel would kill the
# program for its next few pages.
_SPARE_BYTES: Final = 64 * 1024 * 1024


class Segment:
    """One piece of shared memory. It is unmapped when the segment and all views of it are gone.

    Attributes:
        number: Its number, by which callers and workers know it.
        size: Bytes.
        fd: Descriptor to pass to the workers.
    """

    def __init__(self, number: int, size: int, *, is_reserved: bool = True) -> None:
        """Make and reserve it.

        Args:
            number: Its number, by which callers and workers know it.
            size: Bytes.
            is_reserved: Reserve all of it now. Otherwise only ask whether there is room, and leave that to
                :meth:`Slot.reserve`: a gigabyte takes a quarter of a second.

        Raises:
            OSError: There is no room (ENOSPC, ENOMEM), no descriptor, or no shared memory to be had.
        """
        self.number = number
        self.size = size
        self.fd = open_shared_memory(size)
        try:
            if size > _free_bytes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Its size alone promises nothing: where memory is full, touching a page would be a SIGBUS.
            if not reserve(self.fd, 0, size if is_reserved else min(size, _PAGE_BYTES)):
                fill(self.fd, size)  # all of it, since it can't be reserved piece by piece
            with naming("mmap"):
                self.map = mmap.mmap(self.fd, size)
        except BaseException:
            posix.close(self.fd)
            raise

    def close(self) -> None:
        """Give back the descriptor; the memory goes when the last view goes."""
        if self.fd >= 0:
            posix.close(self.fd)
            self.fd = -1


class Slot:
    """A contiguous piece of a segment, leased as a whole.

    Attributes:
        segment: Segment that it is a piece of.
        offset: Its first byte in the segment.
        nbytes: Its bytes.
        is_alone: True if the segment was made for it, and goes with it.
        holders: Leases on it; with the last one it goes back to the arena.
    """

    __slots__ = ("holders", "is_alone", "nbytes", "offset", "segment")

    def __init__(self, segment: Segment, offset: int, nbytes: int, *, is_alone: bool) -> None:
        self.segment = segment
        self.offset = offset
        self.nbytes = nbytes
        self.is_alone = is_alone
        self.holders = 0

    def __repr__(self) -> str:
        return f"Slot(segment={self.segment.number}, offset={self.offset}, nbytes={self.nbytes})"

    def reserve(self, start: int, end: int) -> None:
        """Make sure that bytes [start, end) of the slot can be written to.

        Raises:
            ArenaError: Something else has taken the memory.
        """
        if not self.is_alone:
            return  # its segment was reserved as a whole
        try:
            reserve(self.segment.fd, start, end)  # refused: the segment was filled as a whole
        except OSError as error:
            raise _shortage(end - start, error) from error


class Holes:
    """The unused pieces of the shared segments, neighbours joined; the newest last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], int] = {}  # (segment, start): end
        self._starts: dict[tuple[int, int], int] = {}  # (segment, end): start

    def take(self, size: int) -> tuple[int, int] | None:
        """Segment and start of ``size`` bytes; the smallest hole that has them gives them, of equal ones the newest."""
        best: tuple[int, int] | None = None
        best_size = 0
        for (segment, start), end in reversed(self._ends.items()):
            if end - start >= size and (best is None or end - start < best_size):
                best, best_size = (segment, start), end - start
                if best_size == size:
                    break
        if best is None:
            return None
        segment, start = best
        self.remove(segment, start)
        if best_size > size:
            self._put(segment, start + size, start + best_size)
        return best

    def add(self, segment: int, start: int, end: int) -> None:
        """Give back bytes [start, end) of a segment."""
        before = self._starts.get((segment, start))
        if before is not None:
            self.remove(segment, before)
            start = before
        if (segment, end) in self._ends:
            end = self.remove(segment, end)
        self._put(segment, start, end)

    def remove(self, segment: int, start: int) -> int:
        """Take the hole that starts there as a whole; returns its end."""
        end = self._ends.pop((segment, start))
        del self._starts[segment, end]
        return end

    def has(self, segment: int, start: int, end: int) -> bool:
        """True if exactly these bytes are a hole."""
        return self._ends.get((segment, start)) == end

    def clear(self) -> None:
        """Forget all."""
        self._ends.clear()
        self._starts.clear()

    def _put(self, segment: int, start: int, end: int) -> None:
        self._ends[segment, start] = end
        self._starts[segment, end] = start


class Arena:
    """Allocates slots within a limit. Not thread-safe: owned by the coordinator's thread.

    Slots of up to ``block_bytes`` share segments. A larger slot gets a segment of its own, which lives as long as it.
    """

    def __init__(self, max_bytes: int, block_bytes: int, segment_bytes: int) -> None:
        """Make an empty arena; memory is reserved when it is first needed.

        Args:
            max_bytes: Most bytes to reserve at one time.
            block_bytes: Largest slot that shares a segment with others; a multiple of 64 KiB.
            segment_bytes: Size of a segment that is shared; a multiple of 64 KiB, at least ``block_bytes``.
        """
        self.max_bytes = max_bytes
        self.reserved_bytes = 0
        self.segments: dict[int, Segment] = {}
        self._block_bytes = block_bytes
        self._segment_bytes = segment_bytes
        self._holes = Holes()
        self._made: list[Segment] = []
        self._dropped: list[Segment] = []
        self._next_number = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"Arena(reserved={self.reserved_bytes}, max={self.max_bytes}, segments={len(self.segments)})"

    def allocate(self, nbytes: int, *, beyond_limit: bool = False) -> Slot | None:
        """A slot of at least ``nbytes``; None if there is no room.

        Args:
            nbytes: Bytes needed, at least 1.
            beyond_limit: Go beyond ``max_bytes`` if need be.

        Raises:
            ArenaError: The host has no shared memory left, and the arena has none either.
            ArenaClosed: The arena was closed.
        """
        if self._is_closed:
            raise ArenaClosed("the shared memory was given back when its pool was closed; make a new pool")
        if nbytes > self._block_bytes:
            size = _round_up(nbytes, _PAGE_BYTES)
            self._drop_free_segments(size)
            segment = self._make_segment(size, beyond_limit, is_reserved=False)
            return None if segment is None else Slot(segment, 0, size, is_alone=True)
        size = _round_up(nbytes, GRAIN_BYTES)
        place = self._holes.take(size)
        if place is None and not self._add_shared_segment(size, beyond_limit=False):
            self._drop_free_segments(size)  # too small for this slot, and in the way of one that is not
            self._add_shared_segment(size, beyond_limit=beyond_limit)
        place = place or self._holes.take(size)
        return None if place is None else Slot(self.segments[place[0]], place[1], size, is_alone=False)

    def free(self, slot: Slot) -> None:
        """Take a slot back."""
        if slot.is_alone:
            # Kept for the next one, it might be of the wrong size, and would be most of the memory.
            self._drop_segment(slot.segment)
            return
        self._holes.add(slot.segment.number, slot.offset, slot.offset + slot.nbytes)
        if self.reserved_bytes > self.max_bytes:  # after a slot beyond the limit: come back below it
            self._drop_free_segments(0)

    def take_changes(self) -> tuple[list[Segment], list[Segment]]:
        """The segments made and those dropped since the last call, for the workers to map and to unmap."""
        changes = self._made, self._dropped
        self._made, self._dropped = [], []
        return changes

    def close(self) -> None:
        """Give back all that is not leased; leased memory goes with its last view. Idempotent."""
        self._is_closed = True
        for segment in self.segments.values():
            segment.close()
        self.segments.clear()
        self.take_changes()
        self._holes.clear()
        self.reserved_bytes = 0

    def _add_shared_segment(self, least: int, *, beyond_limit: bool) -> bool:
        # Larger ones as the arena grows: each costs a descriptor, of which a process has perhaps 1024.
        wanted = max(self._segment_bytes, min(self.reserved_bytes // 8, _MAX_SEGMENT_BYTES))
        wanted = min(wanted, largest_file_bytes() or wanted)
        room = self.max_bytes - self.reserved_bytes
        # Whole blocks where there is room for one: the rest of a segment would be of little use.
        grain = self._block_bytes if room >= self._block_bytes else GRAIN_BYTES
        size = max(least, min(wanted, room) // grain * grain)
        segment = self._make_segment(size, beyond_limit)
        if segment is None:
            return False
        self._holes.add(segment.number, 0, segment.size)
        return True

    def _make_segment(self, size: int, beyond_limit: bool, *, is_reserved: bool = True) -> Segment | None:
        if self.reserved_bytes + size > self.max_bytes and not beyond_limit:
            return None
        try:
            segment = Segment(self._next_number, size, is_reserved=is_reserved)
        except OSError as error:
            self._go_on_without(size, error, is_for_one_slot=not is_reserved)
            return None
        self._next_number += 1
        self._made.append(segment)
        self.segments[segment.number] = segment
        self.reserved_bytes += size
        return segment

    def _go_on_without(self, size: int, error: OSError, *, is_for_one_slot: bool) -> None:
        if not self.segments:
            raise _shortage(size, error) from error
        # One large slot that does not fit says nothing of small ones: what the host still has may be used for these.
        spare_bytes = _free_bytes() if is_for_one_slot and error.errno == errno.ENOSPC else 0
        self.max_bytes = min(self.max_bytes, self.reserved_bytes + spare_bytes)
        log.warning("shared memory is short (%s): going on with %d bytes", error.strerror, self.max_bytes)

    def _drop_free_segments(self, wanted: int) -> None:
        # Recycled slots that nobody uses now must not stand in the way of one large slot.
        for segment in list(self.segments.values()):
            if self.reserved_bytes + wanted <= self.max_bytes:
                return
            if self._holes.has(segment.number, 0, segment.size):
                self._holes.remove(segment.number, 0)
                self._drop_segment(segment)

    def _drop_segment(self, segment: Segment) -> None:
        del self.segments[segment.number]
        self.reserved_bytes -= segment.size
        if segment in self._made:  # nobody has heard of it, and without its descriptor nobody could map it
            self._made.remove(segment)
        else:
            self._dropped.append(segment)
        segment.close()


def _shortage(size: int, error: OSError) -> ArenaError:
    return ArenaError(f"can't reserve {size} bytes of shared memory: {error.strerror}{_advice(error)}")


def _advice(error: OSError) -> str:
    """Explanation of an error of shared memory, and the advice that helps against it, as the end of a message."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "; raise the limit of open files (ulimit -n)"
    if error.errno == errno.EFBIG:
        limit = largest_file_bytes()
        return f": the limit of file sizes (ulimit -f) is {limit} bytes; raise it (ulimit -f unlimited)"
    free = _free_bytes()
    shrink = "lower PoolConfig.max_memory (MPREADER_MAX_MEMORY)"
    if has_memfd() and error.errno in REFUSED:
        return ": a filter or a security module refuses that system call"
    if has_memfd():
        return f"; {free} bytes of memory are free. Free some, or {shrink}"
    without = " (memfd_create is refused, so /dev/shm is needed)"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f": there is no /dev/shm{without}; mount it: mount -t tmpfs -o mode=1777 tmpfs /dev/shm"
    if error.errno == errno.EROFS:
        return f": /dev/shm is read-only{without}; mount -o remount,rw /dev/shm"
    if error.errno in REFUSED:
        return f": /dev/shm may not be written to{without}; chmod 1777 /dev/shm"
    return f"; /dev/shm has {free} bytes free{without}. Enlarge it (docker run --shm-size=1g) or {shrink}"


def _free_bytes() -> int:
    """Bytes that a segment may have."""
    memory = available_memory()
    known = [] if memory is None else [memory - min(_SPARE_BYTES, memory // 4)]
    if not has_memfd() and (shm := free_shm()) is not None:
        known.append(shm)
    return min(known, default=1 << 60)


def _round_up(nbytes: int, grain: int) -> int:
    return -(-nbytes // grain) * grain
