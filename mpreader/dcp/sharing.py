"""Sharing: the ranks of a host load together. Finds out in DCP's own planning who they are, and begins their read.

::

    prepare_local_plan    each rank     offer()   in plan.storage_data, goes to the rank that plans
    prepare_global_plan   that rank     group_plans()  names a leader for each host, goes back with the plans
    read_data             each rank     HostReads   the leader receives for all, the others from it

No collective is added, and no environment variable is needed. Why a rank does not share is logged at level DEBUG.
``.metadata`` is downloaded by each rank, since DCP reads it before any rank knows of the others: to find out who is to
download it, the ranks would have to race for that first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlan

from mpreader.dcp.host_plan import Answer, ItemNeed, Need, plan_host, taken_runs, takes_all
from mpreader.dcp.planned import PlannedItem
from mpreader.pool.blocking import sockets_are_patched
from mpreader.pool.hosts.identity import HostOffer, HostShare, Listener, group, host_identity
from mpreader.pool.hosts.member import HostMember
from mpreader.pool.hosts.messages import Joined, SharedRead
from mpreader.pool.hosts.part import HostPart
from mpreader.pool.hosts.server import HostServer
from mpreader.pool.pool import release_shared_pool, use_shared_pool
from mpreader.pool.source import Source
from mpreader.pool.stats import PoolStats, total
from mpreader.ranges import ItemRange
from mpreader.ranks import local_rank
from mpreader.readers.load_plan import range_of, uri_of
from mpreader.readers.multiprocess_constructor import MultiprocessConstructor
from mpreader.readers.read_ahead import ReadAhead, load_progress
from mpreader.sources.versions import SteadySource

__all__ = [
    "HostReads",
    "Offered",
    "as_received",
    "group_plans",
    "has_other_ranks",
    "is_likely_leader",
    "need_of",
    "try_offer",
]

log = logging.getLogger(__name__)

_SOURCE_VARIABLES: Final = (
    *("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"),
    "AWS_CONFIG_FILE",
)
# Of the time after which a read fails since memory is kept: a rank that keeps it is dropped before.
_DROP_SHARE: Final = 0.6
# A rank that verifies for others may be dead, stopped or stuck: if no rank gets on for so long, they don't wait.
_VERDICT_S: Final = 5.0
_VERDICT_POLL_S: Final = 0.005  # the board tells nobody that something was written on it
_GOOD, _DAMAGED = 1, 2


class Offered:
    """A rank's offer to lead its host: what it tells the others, and the socket behind it."""

    def __init__(self, offer: HostOffer, listener: Listener) -> None:
        self.offer = offer
        self.listener = listener
        self.close = weakref.finalize(self, listener.close)


def has_other_ranks() -> bool:
    """Returns True if this process is one of several ranks, which may load together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_likely_leader() -> bool:
    """Returns True if this process is likely to be the first rank of its host, which leads."""
    return local_rank() == 0 or (local_rank() is None and dist.get_rank() == 0)


def try_offer(constructor: MultiprocessConstructor) -> Offered | None:
    """Returns the offer of this rank; None if it can't share.

    Args:
        constructor: Constructor of the readers. Ranks share only if theirs reach S3 by the same settings.
    """
    if sockets_are_patched():
        log.debug("this rank reads by itself: gevent has patched its sockets")
        return None
    try:
        listener = Listener()
        try:
            return Offered(
                HostOffer(f"{host_identity()}:{_settings_of(constructor)}", listener.address, listener.token), listener
            )
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        log.debug("this rank reads by itself: its host can't be told, or sockets are refused: %s", error)
        return None


def _settings_of(constructor: MultiprocessConstructor) -> str:
    """Returns a digest of the settings by which S3 is reached: the same URI may be another object elsewhere."""
    client = constructor.client
    environment = [os.environ.get(name, "") for name in _SOURCE_VARIABLES]
    settings = repr((client.region, client.s3client_config, environment))
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def group_plans(plans: Sequence[LoadPlan]) -> list[LoadPlan]:
    """Tell each rank, in ``storage_data`` of its plan, with whom it shares its host; None: with nobody."""
    offers = [plan.storage_data if isinstance(plan.storage_data, HostOffer) else None for plan in plans]
    return [
        plan if offer is None else dataclasses.replace(plan, storage_data=share)
        for plan, offer, share in zip(plans, offers, group(offers), strict=True)
    ]


def need_of(items: Iterable[PlannedItem], path: Any, *, verifies: bool = True) -> Need:
    """Returns what a rank needs, from its items with the bytes of their boxes.

    Args:
        items: The items, in the order in which they are read.
        path: URI of the checkpoint.
        verifies: True if the rank compares checksums.

    Raises:
        PlanError: An item lies outside of the checkpoint, or has an impossible place.
    """
    need: dict[str, list[ItemNeed]] = {}
    for item in items:
        of_file = need.setdefault(uri_of(path, item.stored.relative_path), [])
        extent = range_of(item.stored)
        of_file.append(ItemNeed(extent.start, extent.size, None if item.selection is None else (item.selection,)))
    return Need(need, verifies)


class HostReads:
    """A rank's part of the read that its host shares; begins it.

    Args:
        share: What the rank was told of its host.
        offered: The rank's own offer; if it leads, the others connect there.
        need: What it needs; see :func:`need_of`.
        constructor: Constructor of the readers of the files.
        on_end: Called with the statistics of the host's read when it is over, in the leader, by another thread.

    Attributes:
        ahead: The reads, for the constructor.
        answer: What the rank was told of the items that it needs.

    Raises:
        PoolError: The read could not begin.
    """

    def __init__(
        self,
        share: HostShare,
        offered: Offered,
        need: Need,
        constructor: MultiprocessConstructor,
        on_end: Callable[[PoolStats, int], object],
    ) -> None:
        self.is_leader = share.place == 0
        sources = constructor.sources(need.files)
        self._host: HostPart
        if self.is_leader:
            self._host = _lead(share, offered, need, constructor, sources, on_end)
        else:
            offered.close()
            self._host = HostMember(share, need)
        try:
            joined: Joined = self._host.joined()
            self.answer: Answer = joined.answer
            self._place = joined.place
            self._repeats = joined.repeats
            self.ahead = ReadAhead(
                {uri: _ranges(items, uri, self.answer) for uri, items in need.files.items()},
                self.answer.parts,
                sources,
                lambda: self._host.begin(list(sources.values())),
                max_bytes=joined.max_bytes,
                progress=load_progress(sum(one.nbytes for one in joined.slot_reads), show=constructor.progress),
                before_take=self._get_on,
                release=self._host.leave,
                abandon=self._host.abandon,
            )
        except BaseException:
            self._host.close()
            raise
        if not self.ahead.transfer:  # nothing to take: the others need not wait for it
            self._host.leave()

    def _get_on(self) -> None:
        self._host.board.tick(self._place)
        self._host.flush()

    def tell_verdict(self, item: PlannedItem, *, is_good: bool) -> None:
        """Tell the other ranks what has become of an item, if this rank verifies it for them."""
        if item.check.is_own and item.check.verdict is not None:
            self._host.board.note(item.check.verdict.number, _GOOD if is_good else _DAMAGED)

    def unverified(self, items: Iterable[PlannedItem], path: Any) -> list[PlannedItem]:
        """Wait for what other ranks say of items that they verify; returns those that are not known to be good.

        They may be damaged, or the rank has ended before it came to them, or is silent. Or memory was short, and a part
        was received a second time: then that rank may have verified other bytes than this one has copied.

        Each rank verifies in the order of its load, and none waits here before it has said all, so that they can't wait
        for each other.
        """
        board = self._host.board
        deadline_s, ticks = 0.0, b""
        unverified = []
        for item in items:
            verdict = item.check.verdict
            assert verdict is not None, "another rank verifies it"
            while not board.noted(verdict.number) and not board.has_ended(verdict.place):
                now, last, ticks = time.monotonic(), ticks, board.ticks()
                if ticks != last:
                    deadline_s = now + _VERDICT_S
                elif now > deadline_s:
                    break
                time.sleep(_VERDICT_POLL_S)
            # Not before the verdict, which may be of the later bytes.
            if self._was_repeated(item, path) or board.noted(verdict.number) != _GOOD:
                unverified.append(item)
        return unverified

    def _was_repeated(self, item: PlannedItem, path: Any) -> bool:
        """Returns True if a part that this rank has taken of an item was received more than once."""
        first, parts = self.ahead.parts_by_file[uri_of(path, item.stored.relative_path)]
        extent = range_of(item.stored)
        of_item = slice(
            first + bisect_right(parts, extent.start, key=lambda part: part.end),
            first + bisect_left(parts, extent.end, key=lambda part: part.start),
        )
        return any(map(self._host.board.noted, self._repeats[of_item]))

    def check_held(self) -> None:
        """Check that what was copied until now was right; see :meth:`HostPart.check_held`."""
        self._host.check_held()

    @property
    def stats(self) -> PoolStats:
        """Statistics of the host's read, as far as this rank knows."""
        return self._host.stats

    def own_stats(self, stats: PoolStats) -> PoolStats:
        """Returns the statistics of this rank: the leader has received everything, the others nothing of the read."""
        if self.is_leader:
            return total([self._host.stats, stats])
        taken = self.ahead.transfer.taken_bytes if self.ahead.transfer is not None else 0
        return dataclasses.replace(stats, shared_bytes=stats.shared_bytes + taken)

    def close(self) -> None:
        """Leave the host's read; in the leader this ends it for all. Idempotent."""
        self._host.close()


def _lead(
    share: HostShare,
    offered: Offered,
    need: Need,
    constructor: MultiprocessConstructor,
    sources: dict[str, SteadySource],
    on_end: Callable[[PoolStats, int], object],
) -> HostServer:
    """Begin to receive for all ranks of the host; the arguments are those of :class:`HostReads`."""
    pool = constructor.host_pool()

    def end(stats: PoolStats, ranks: int) -> None:
        release_shared_pool(pool, keep_warm=True)
        on_end(stats, ranks)

    def plan(needs: Sequence[Need]) -> tuple[Sequence[Source], SharedRead]:
        uris, read = plan_host(needs, max_gap_bytes=constructor.max_gap_size, part_bytes=pool.sizes.part_bytes)
        others = constructor.sources([uri for uri in uris if uri not in sources])
        return [sources.get(uri) or others[uri] for uri in uris], read

    use_shared_pool(pool)  # the other ranks may need it for longer than the constructor
    try:
        drop_after_s = _DROP_SHARE * pool.timeouts.lease_timeout_s
        return HostServer(offered.listener, share.ranks, pool, plan, need, drop_after_s=drop_after_s, on_end=end)
    except BaseException:
        release_shared_pool(pool, keep_warm=True)
        raise


def as_received(items: Iterable[PlannedItem], need: Need, answer: Answer, path: Any) -> list[PlannedItem]:
    """Returns the items of a rank's need as they are received: of those that it takes all of, nothing is selected."""
    told = {uri: zip(of_file, answer.checks[uri], strict=True) for uri, of_file in need.files.items()}
    received = []
    for item in items:
        needed, check = next(told[uri_of(path, item.stored.relative_path)])
        if takes_all(needed, check, answer):
            item = item._replace(selection=None)
        # One that compares no checksums relies on no other rank, either: it counts what it loads as not verified.
        received.append(item if check is None or not need.verifies else item._replace(check=check))
    return received


def _ranges(items: Sequence[ItemNeed], uri: str, answer: Answer) -> list[ItemRange]:
    """Returns the ranges that a rank takes of a file."""
    checked = zip(items, answer.checks[uri], strict=True)
    return [ItemRange(*run) for item, check in checked for run in taken_runs(item, check, answer)]
