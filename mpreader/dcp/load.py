"""Load: one load of a storage reader, by the multiprocess constructor.

The bytes of its items are received by this rank alone, or together by the ranks of its host::

    planned ──► begin()                             alone: the downloads start at once
       └──────► offer() ──► begin_planned()         when all ranks have planned: together, or alone after all
                                 │
                              read()                copies the items into the planner's targets
                                 ├ again:           items that were not stored as expected, or came damaged
                                 └ unverified:      items that another rank was to verify, and has not

Whatever goes wrong with the sharing, the rank receives what it has not got yet by itself. This module decides what is
received when; it must not decode bytes itself.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.dcp.boxes import NO_BOXES, box_key, load_ranges, needed_boxes, planned_items, select_boxes
from mpreader.dcp.filesystem import Path, S3FileSystem
from mpreader.dcp.items import ItemLoader, ItemReader, LoadedBytes
from mpreader.dcp.planned import OWN_CHECK, PlannedItem
from mpreader.dcp.sharing import HostReads, Offered, as_received, need_of, try_offer
from mpreader.errors import ArenaError, ArenaExhausted, PoolError
from mpreader.pool.hosts.identity import HostOffer, HostShare
from mpreader.pool.hosts.messages import HostLost
from mpreader.pool.stats import PoolStats
from mpreader.readers.multiprocess_constructor import MultiprocessConstructor
from mpreader.readers.protocols import StoredItem
from mpreader.telemetry.events import LoadEvent, report_load

__all__ = ["Load", "sorted_items"]

log = logging.getLogger(__name__)


class _Progress:
    """Progress of the load of a list of items: what is done, and what must be received otherwise, or once more.

    Args:
        host: The shared reads that they are received by, whose other ranks hear of it.

    Attributes:
        loaded: Number of items that were loaded, or must be received in another way.
        again: The latter.
        trusted: Items that were loaded, and that another rank verifies.
    """

    def __init__(self, host: HostReads | None = None) -> None:
        self._host = host
        self.loaded = 0
        self.again: list[PlannedItem] = []
        self.trusted: list[PlannedItem] = []

    def note(self, item: PlannedItem, again: PlannedItem | None) -> None:
        """Note that an item was loaded, or has to be received as ``again`` says."""
        self.loaded += 1
        if again is not None:
            self.again.append(again)
        elif not item.check.is_own and item.check.verdict is not None:
            self.trusted.append(item)
        if self._host is not None:
            self._host.tell_verdict(item, is_good=again is None)


class Load:
    """One load of a storage reader.

    Args:
        path: URI of the checkpoint.
        storage_data: Where its items are stored.
        entries: Descriptions of its tensors.
        fs: Opens its files.
        constructor: Makes the readers of the files.
        verify: As for the storage reader.
        transforms: Undoes the extensions of the save; None if torch is too old for extensions.
        began_s: When the load began, by the monotonic clock.
    """

    def __init__(
        self,
        path: Path,
        storage_data: Mapping[MetadataIndex, StoredItem],
        entries: Mapping[str, Any],
        fs: S3FileSystem,
        constructor: MultiprocessConstructor,
        *,
        verify: bool | Literal["whole"],
        transforms: Any,
        began_s: float,
    ) -> None:
        self._path = path
        self._storage_data = storage_data
        self._entries = entries
        self._fs = fs
        self._constructor = constructor
        self._verify = verify
        self._transforms = transforms
        self._began_s = began_s
        self._boxes = NO_BOXES  # of the items that the plan does not take whole
        self._read_whole: set[MetadataIndex] = set()  # the other items, if there are boxes
        self._loaded = LoadedBytes()
        self._offered: Offered | None = None  # until all ranks have planned
        self._host: HostReads | None = None  # the reads, if they are shared
        self._shared_items: list[PlannedItem] = []  # what this rank takes of them

    def is_of(self, path: Path, storage_data: Mapping[MetadataIndex, StoredItem]) -> bool:
        """Return True if it loads what is stored there."""
        return self._path == path and self._storage_data is storage_data

    # -- begin

    def begin(self, items: Sequence[ReadItem]) -> None:
        """Begin to receive the items of a plan, which are sorted, by this rank alone."""
        if self._verify != "whole":
            boxes = select_boxes(items, self._storage_data, self._entries)
            if boxes.files:
                self._boxes = boxes
                self._read_whole = {item.storage_index for item in items} - {key[0] for key in boxes.selections}
                planned = planned_items(items, self._storage_data, boxes.selections)
                ranges = load_ranges(planned, boxes.files, boxes.max_gap_bytes, self._path)
                self._constructor.set_ranges_by_file(*ranges)
                return
        self._constructor.set_item_ranges_by_file(items, self._storage_data, self._path)

    def offer(self) -> HostOffer | None:
        """Return what the other ranks are told of this one; None if it can't share. Nothing is received until then."""
        self._offered = try_offer(self._constructor)
        return None if self._offered is None else self._offered.offer

    def _begin_planned(self, plan: LoadPlan) -> None:
        """Begin the reads of a plan that other ranks have seen: together with those of this host, or alone."""
        offered, self._offered = self._offered, None
        if offered is None:
            return  # they were begun at once
        with collector_paused():
            if isinstance(plan.storage_data, HostShare):
                try:
                    self._begin_shared(plan.storage_data, offered, plan.items)
                    return
                except (PoolError, ArenaError, OSError) as error:
                    log.debug("this rank reads by itself: %s", error)
                except BaseException:
                    offered.close()  # or others would wait for it
                    raise
            else:
                log.debug("this rank reads by itself: no other rank of this load is on its host")
            offered.close()
            self.begin(sorted_items(plan.items, self._storage_data))
            spare_new_objects()

    def _begin_shared(self, share: HostShare, offered: Offered, items: Sequence[ReadItem]) -> None:
        items = sorted_items(items, self._storage_data)  # once more: a planner may have changed its plan
        needed = needed_boxes(items, self._storage_data, self._entries) if self._verify != "whole" else {}
        planned = planned_items(items, self._storage_data, needed)
        path, began_s = self._path, self._began_s

        def log_end(stats: PoolStats, ranks: int) -> None:
            if ranks:  # or it has not begun, and each rank tells of its own load
                log.info(
                    "loaded %s in %.2f s for %d ranks of this host: %s", path, time.monotonic() - began_s, ranks, stats
                )

        need = need_of(planned, path, verifies=bool(self._verify))
        host = self._host = HostReads(share, offered, need, self._constructor, log_end)
        self._shared_items = as_received(planned, need, host.answer, path)
        self._constructor.read_by(host.ahead)

    # -- read

    def read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """Load all items of the plan into the planner's targets; the errors are those of the storage reader."""
        self._begin_planned(plan)
        host = self._host
        try:
            loader = ItemLoader(
                planner,
                self._transforms,
                verify=bool(self._verify),
                loaded=self._loaded,
                check_held=host.check_held if host is not None else None,
            )
            if host is not None:
                self._load_with_others(host, loader)
            else:
                self._load_alone(plan.items, loader)
        except BaseException:
            if host is not None:  # the others must not wait for this rank if it has failed while no file was open
                host.ahead.retire()
            raise
        log.log(
            logging.INFO if host is None else logging.DEBUG,
            *("loaded %s in %.2f s: %s", self._path, time.monotonic() - self._began_s, self.stats),
        )
        report_load(LoadEvent(str(self._path), self._loaded.verified, self._loaded.unverified))

    def _load_alone(self, items: Sequence[ReadItem], loader: ItemLoader) -> None:
        begun, added = self._begun_and_added(items)
        again = self._load_items(planned_items(begun, self._storage_data, self._boxes.selections), loader)
        self._load_again(again + planned_items(added, self._storage_data, {}), loader)

    def _load_with_others(self, host: HostReads, loader: ItemLoader) -> None:
        trusted = self._load_shared(host, loader)
        if self._verify:  # after all that this rank does for the others
            unverified = host.unverified(trusted, self._path)
            self._load_again([PlannedItem(item.request, item.stored) for item in unverified], loader)

    def _load_shared(self, host: HostReads, loader: ItemLoader) -> list[PlannedItem]:
        """Load the items that the ranks of this host receive together, and alone what has gone wrong there.

        Returns:
            The items that another rank verifies.
        """
        progress = _Progress(host)
        again = progress.again
        try:
            self._load_items(self._shared_items, loader, progress)
        except (HostLost, ArenaExhausted) as error:
            # What this rank receives by itself, it verifies for itself.
            rest = [item._replace(check=OWN_CHECK) for item in self._shared_items[progress.loaded :]]
            log.debug("this rank reads %d of %d items by itself: %s", len(rest), len(self._shared_items), error)
            again += rest
        loader.leave_host()
        self._load_again(again, loader)
        return progress.trusted

    def _load_again(self, items: list[PlannedItem], loader: ItemLoader) -> None:
        """Receive and load items that have come otherwise than expected, all at once: one alone costs a round trip."""
        if not items:
            return
        log.debug("%d items of %s are received again, or otherwise than was planned", len(items), self._path)
        items.sort(key=lambda item: _location(item.stored))
        files = {item.stored.relative_path for item in items}
        ranges = load_ranges(items, files, self._boxes.max_gap_bytes, self._path)
        self._constructor.set_ranges_by_file(*ranges, continues=True)
        self._load_items(items, loader)

    def _load_items(
        self, items: Iterable[PlannedItem], loader: ItemLoader, progress: _Progress | None = None
    ) -> list[PlannedItem]:
        """Load items, file by file; returns those that have to be received in another way."""
        progress = progress or _Progress()
        items_by_file: dict[str, list[PlannedItem]] = {}
        for item in items:
            items_by_file.setdefault(item.stored.relative_path, []).append(item)
        for relative_path, planned in items_by_file.items():
            uri = self._fs.concat_path(self._path, relative_path)
            with self._fs.create_stream(uri, "rb") as reader:
                for item in planned:
                    progress.note(item, loader.load(item, uri, cast("ItemReader", reader)))
        return progress.again

    def _begun_and_added(self, items: Sequence[ReadItem]) -> tuple[Sequence[ReadItem], list[ReadItem]]:
        """Split the items of the final plan into those whose bytes are being read, and others.

        Nearly always there are no others. But a planner may change its plan in ``create_global_plan`` and
        ``finish_plan``, after the reads have begun: to other boxes of the same stored items, for one.
        """
        if not self._boxes.selections:  # every item is read whole, so that any box of it can be loaded
            return items, []
        begun: list[ReadItem] = []
        added: list[ReadItem] = []
        for item in items:
            is_read = item.storage_index in self._read_whole or box_key(item) in self._boxes.selections
            (begun if is_read else added).append(item)
        return begun, added

    # -- after it

    @property
    def stats(self) -> PoolStats:
        """Counts of what this rank has received and loaded so far."""
        stats, loaded = self._constructor.stats(), self._loaded
        if self._host is not None:
            stats = self._host.own_stats(stats)
        return dataclasses.replace(
            stats,
            over_read=stats.over_read + loaded.over_read,
            verified_bytes=loaded.verified,
            unverified_bytes=loaded.unverified,
        )

    @property
    def host_stats(self) -> PoolStats:
        """Counts of the read that the ranks of this host have shared, as far as this rank knows; else :attr:`stats`."""
        return self._host.stats if self._host is not None else self.stats

    def close(self) -> None:
        """Leave the ranks of this host. Idempotent."""
        if self._host is not None:
            self._host.close()
        offered, self._offered = self._offered, None
        if offered is not None:
            offered.close()


def sorted_items(items: Iterable[ReadItem], storage_data: Mapping[MetadataIndex, StoredItem]) -> list[ReadItem]:
    """Return items in the order of their bytes, boxes of one item included."""
    return sorted(items, key=lambda request: (*_location(storage_data[request.storage_index]), request.storage_offsets))


def _location(stored: StoredItem) -> tuple[str, int]:
    return stored.relative_path, stored.offset
