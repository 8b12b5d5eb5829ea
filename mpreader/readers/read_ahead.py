"""Read ahead: the reads of one load plan, begun when the plan is known, and shared by the readers of its files.

A :class:`ReadAhead` belongs to the readers as well as to the constructor, which may be dropped, closed or pickled while
readers are open::

    active ── all files read, a reader failed, another plan, constructor closed ──► retired
    retired, and no reader is open ──► over: the downloads end, the pool is released
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from mpreader.errors import PoolClosed
from mpreader.pool.pool import Pool, release_shared_pool, use_shared_pool
from mpreader.pool.requests import SlotRead
from mpreader.pool.source import ObjectVersion
from mpreader.pool.transfer import Transfer
from mpreader.ranges import ItemRange, Part, plan_files
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client
    from mpreader.sources.versions import SteadySource

__all__ = ["ReadAhead", "load_progress", "steady_sources"]


def _nothing() -> None:
    pass


class ReadAhead:
    """Reads of one load plan, shared by the readers of its files.

    Args:
        ranges_by_file: Ranges of the plan by URI, in the order in which DCP will read them.
        parts_by_file: Parts of each file by URI. Each part is one slot read, and they follow each other.
        sources: Sources of the files, at least; may hold others of the same load.
        begin: Begins the reads; not called if there are no parts.
        max_bytes: Largest number of bytes of shared memory that the pool may reserve.
        progress: Progress bar.
        before_take: Called before each part is taken: views of parts that came before may have ended.
        release: Called once when the reads are over.
        abandon: Called in its place if they were dropped, in the middle of a garbage collection: must not wait. None:
            the same.

    Attributes:
        ranges_by_file: The ranges of the plan.
        parts_by_file: Parts of each file by URI, with the index of the slot read of the first part.
        sources: The sources, which know the versions that are read.
        max_bytes: Largest number of bytes of shared memory that the pool may reserve.
        transfer: The read in progress; None if the plan has no bytes to read.
    """

    def __init__(
        self,
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        parts_by_file: Mapping[str, list[Part]],
        sources: Mapping[str, SteadySource],
        begin: Callable[[], Transfer],
        *,
        max_bytes: int,
        progress: Progress,
        before_take: Callable[[], object] = _nothing,
        release: Callable[[], object] = _nothing,
        abandon: Callable[[], object] | None = None,
    ) -> None:
        self.ranges_by_file = ranges_by_file
        self.sources = sources
        self.max_bytes = max_bytes
        self.parts_by_file: dict[str, tuple[int, list[Part]]] = {}
        first = 0
        for uri, parts in parts_by_file.items():
            self.parts_by_file[uri] = first, parts
            first += len(parts)
        # Files whose reader was not closed yet. Files without bytes don't count: nothing is downloaded for them.
        self._unread = {uri for uri, parts in parts_by_file.items() if parts}
        self._readers = 0  # readers that are open
        self._is_retired = not first
        self._progress = progress
        self._before_take = before_take
        self._release = release
        self._finalizer = weakref.finalize(self, abandon or release)
        # Last: whatever fails after it, a Ctrl-C for one, would leave a read that nobody closes.
        self.transfer: Transfer | None = begin() if first else None

    @classmethod
    def of_pool(
        cls,
        pool: Pool,
        sources: Mapping[str, SteadySource],
        ranges_by_file: Mapping[str, Sequence[ItemRange]],
        max_gap_bytes: float,
        *,
        max_gap_by_file: Mapping[str, float] = MappingProxyType({}),
        before: ReadAhead | None = None,
        progress: bool | None = False,
    ) -> ReadAhead:
        """Read by a pool.

        Args:
            pool: Shared pool that reads.
            sources: Sources of the files; see :func:`steady_sources`.
            ranges_by_file: Ranges of the plan by URI, in the order in which DCP will read them.
            max_gap_bytes: Largest gap between two ranges that are fetched as one.
            max_gap_by_file: Smaller bounds for some files, by URI.
            before: Reads of the same load that came before these: they have decided which versions of its files are
                read.
            progress: ``show`` of :func:`~mpreader.telemetry.progress.progress_bar`.
        """
        plans = plan_files(
            ranges_by_file,
            max_gap_bytes=max_gap_bytes,
            part_bytes=pool.sizes.part_bytes,
            max_gap_by_file=max_gap_by_file,
        )
        slot_reads = [
            SlotRead(number, part.size, (part,), part.over_read)
            for number, plan in enumerate(plans.values())
            for part in plan.parts
        ]
        bar = load_progress(sum(slot_read.nbytes for slot_read in slot_reads), show=progress)
        # A user of the pool besides the constructor, because readers that are open may outlive the constructor.
        use_shared_pool(pool)
        return cls(
            ranges_by_file,
            {uri: plan.parts for uri, plan in plans.items()},
            # With those of files that are not read now, but perhaps by the reads that come next.
            sources if before is None else {**before.sources, **sources},
            # It may grow beyond max_memory, because an item that is read in pieces smaller than its parts is held until
            # the next one.
            lambda: pool.read(list(sources.values()), slot_reads, grows=True),
            max_bytes=pool.sizes.max_bytes,
            progress=bar,
            release=partial(release_shared_pool, pool, keep_warm=True),
        )

    @property
    def is_over(self) -> bool:
        """True if nothing more can be read with it: it is retired, and no reader is open."""
        return self._is_retired and not self._readers

    def take(self, index: int) -> memoryview:
        """Wait for the slot read ``index`` and take it; see :meth:`mpreader.pool.transfer.Transfer.take`.

        Raises:
            PoolClosed: The load plan has no bytes to read, or the load has ended.
            MpreaderError: The bytes could not be fetched.
        """
        if self.transfer is None:
            raise PoolClosed("the load plan has no bytes to read")
        self._before_take()
        on_wait = self._show_progress if self._progress.is_shown else None
        view = self.transfer.take_first((index,), on_wait=on_wait)[1]
        self._show_progress()  # on_wait is not called for a part that has arrived already
        return view

    def discard(self, start: int, stop: int) -> None:
        """Tell the pool that the slot reads [start, stop) won't be taken any more."""
        if self.transfer is not None:
            self.transfer.discard(start, stop)

    def open_file(self) -> None:
        """Count a reader that was opened."""
        self._readers += 1

    def close_file(self, uri: str, *, has_failed: bool) -> None:
        """Count a reader that was closed; retires after that of the last file, or one that has failed."""
        self._readers -= 1
        self._unread.discard(uri)
        if has_failed or not self._unread:
            self._is_retired = True
        self._close_if_over()

    def retire(self) -> None:
        """End the downloads as soon as no reader is open: another plan has come, or the constructor is gone."""
        self._is_retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        if self.is_over:
            self._progress.close()
            if self.transfer is not None:
                self.transfer.close()
            if self._finalizer.detach():
                self._release()

    def _show_progress(self) -> None:
        if self.transfer is not None and self._progress.is_shown:
            self._progress.advance_to(self.transfer.received_bytes)


def load_progress(nbytes: int, *, show: bool | None) -> Progress:
    """Returns the progress bar of a load of ``nbytes``; for ``show`` see the constructor."""
    return progress_bar(nbytes, "load", show=show) if nbytes else Progress()


def steady_sources(
    client: BaseS3Client,
    uris: Iterable[str],
    versions: Mapping[str, ObjectVersion] = MappingProxyType({}),
    before: ReadAhead | None = None,
) -> dict[str, SteadySource]:
    """Returns the sources of some files.

    Args:
        client: S3 client that signs the requests.
        uris: URIs of the files.
        versions: The only versions that may be read, by URI; of other files, it is the one that the first read finds.
        before: Reads of the same load. Its sources are taken where it has some, so that the same versions are read.
    """
    # Imported here, because they import boto3, which takes 0.1 s: a constructor can be made without it.
    from mpreader.s3 import parse_s3_uri
    from mpreader.sources.s3 import S3Source
    from mpreader.sources.versions import PinnedSource, SteadySource

    def make(uri: str) -> SteadySource:
        source = S3Source(client, *parse_s3_uri(uri))
        return PinnedSource(source, versions[uri]) if uri in versions else SteadySource(source)

    known = before.sources if before is not None else {}
    return {uri: known.get(uri) or make(uri) for uri in uris}
