"""Requests of a load of safetensors files, as the load itself plans them.

It works without torch, but for ranks that share their host: those load by the steps of a DCP load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mpreader.fetch.arguments import DEFAULT_FETCH_GAP_SIZE
from mpreader.fetch.plan import plan_batches
from mpreader.fetch.safetensors import StoredFile, header_pieces
from mpreader.fetch.safetensors_plan import WantedBox, cut_runs, element_bytes, plan_boxes
from mpreader.fetch.summary import (
    FileRequests,
    HostSummary,
    LoadSummary,
    RankSummary,
    ShardedLoadSummary,
    sums_of,
)
from mpreader.formats.safetensors import StoredTensor, packed_shape
from mpreader.formats.selection import GAPS, Gaps, Selection, select_box, shard_box
from mpreader.pool.sizing import PoolSizes
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE, ItemRange, Part, coalesce

__all__ = ["load_summary", "path_in", "sharded_summary"]

Chosen = Sequence[tuple[StoredFile, StoredTensor]]


def path_in(uri: str) -> str:
    """Return the name of a file of a checkpoint: the last part of its URI, without the query of a URL."""
    is_url = uri.startswith(("http://", "https://"))
    return (uri.partition("?")[0] if is_url else uri).rpartition("/")[2]


def load_summary(
    files: Sequence[StoredFile], chosen: Chosen, sizes: PoolSizes, match: tuple[str, ...] | None
) -> LoadSummary:
    """Summarize the requests of a load.

    Args:
        files: Files whose headers it reads.
        chosen: Tensors that it loads.
        sizes: Sizes of its pool.
        match: Patterns that have selected them.
    """
    wanted = [WantedBox(file.uri, stored, None) for file, stored in chosen]
    requests, gap = _requests_of(wanted, sizes)
    return LoadSummary(
        match=match,
        tensors=len(chosen),
        items=0,
        nbytes=sum(stored.end - stored.start for _, stored in chosen),
        part_size=sizes.part_bytes,
        max_gap_size=gap,
        metadata_requests=sum(_header_requests(file, sizes) for file in files),
        head_requests=len(files),
        **sums_of(requests),
    )


def sharded_summary(chosen: Chosen, sizes: PoolSizes, dim: int, ranks: int, *, is_shared: bool) -> ShardedLoadSummary:
    """Summarize the requests of a load by several ranks, each with a shard of every tensor.

    Args:
        chosen: Tensors that they load.
        sizes: Sizes of the pool of each rank.
        dim: Dimension in which the tensors are divided; those that don't have it are loaded by every rank.
        ranks: Number of ranks.
        is_shared: True if ranks of one host can receive together.
    """
    shards = [_shards(chosen, dim, rank, ranks) for rank in range(ranks)]
    of_ranks = []
    for rank, wanted in enumerate(shards):
        requests, _ = _requests_of(wanted, sizes)
        needed = sum(_nbytes_of(one) for one in wanted)
        fetched = sum(file.fetched_nbytes for file in requests)
        of_ranks.append(RankSummary(rank, needed, sum(file.requests for file in requests), fetched))
    host = _host_summary(chosen, shards, sizes) if is_shared and ranks > 1 else None
    needed, fetched = sum(rank.nbytes for rank in of_ranks), sum(rank.fetched_nbytes for rank in of_ranks)
    return ShardedLoadSummary(dim, needed, fetched, tuple(of_ranks), host)


def _requests_of(wanted: Sequence[WantedBox], sizes: PoolSizes) -> tuple[tuple[FileRequests, ...], int]:
    """Return the requests for each file, and the largest gap within one of them."""
    runs, gap = plan_boxes(wanted)
    ranges = cut_runs(wanted, runs, sizes.part_bytes)
    requests = []
    for uri in dict.fromkeys(one.source for one in wanted):
        of_file = [ItemRange(*extent) for extent in ranges.get(uri, ())]
        parts = _parts(of_file, gap, sizes)
        requests.append(FileRequests.of(path_in(uri), of_file, len(coalesce(of_file, max_gap_bytes=gap)), parts))
    return tuple(requests), gap


def _parts(ranges: Sequence[ItemRange], gap: float, sizes: PoolSizes) -> list[Part]:
    """Return the requests for ranges of a file, as the engine of the fetchers plans them."""
    batches = plan_batches(
        0, ranges, order="offset", max_gap_bytes=gap, part_bytes=sizes.part_bytes, slot_bytes=sizes.block_bytes
    )
    return [part for batch in batches for part in batch.slot_read.parts]


def _header_requests(file: StoredFile, sizes: PoolSizes) -> int:
    end = min((stored.start for stored in file.header.tensors.values()), default=file.version.size)
    waves = header_pieces(end, file.version.size, sizes.part_bytes)
    return sum(len(_parts([ItemRange(*piece) for piece in wave], DEFAULT_FETCH_GAP_SIZE, sizes)) for wave in waves)


def _shards(chosen: Chosen, dim: int, rank: int, ranks: int) -> list[WantedBox]:
    """Return the boxes that a rank loads; a shard without elements is not loaded."""
    shards = []
    for file, stored in chosen:
        size = packed_shape(stored)
        box = shard_box(size, dim, rank, ranks)
        is_whole = all(length == whole for (_, length), whole in zip(box, size, strict=True))
        shards.append(WantedBox(file.uri, stored, None if is_whole else box))
    return shards


def _nbytes_of(wanted: WantedBox) -> int:
    if wanted.box is None:
        return wanted.stored.end - wanted.stored.start
    return math.prod(length for _, length in wanted.box) * element_bytes(wanted.stored)


def _host_summary(chosen: Chosen, shards: Iterable[Sequence[WantedBox]], sizes: PoolSizes) -> HostSummary:
    """Plan what the ranks receive together, by the steps of a load that they share."""
    from mpreader.dcp.host_plan import ItemNeed, Need, plan_host  # imports torch

    needs = []
    for wanted in shards:
        items: dict[str, list[ItemNeed]] = {}
        for one in wanted:
            nbytes, selection = one.stored.end - one.stored.start, _try_select(one)
            if _nbytes_of(one):
                selections = None if selection is None else (selection,)
                items.setdefault(one.source, []).append(ItemNeed(one.stored.start, nbytes, selections))
        needs.append(Need(items, verifies=False))
    _, read = plan_host(needs, max_gap_bytes=DEFAULT_MAX_GAP_SIZE, part_bytes=sizes.part_bytes)
    nbytes = sum(stored.end - stored.start for _, stored in chosen)
    return HostSummary(nbytes, len(read.slot_reads), sum(slot_read.requested_bytes for slot_read in read.slot_reads))


def _try_select(wanted: WantedBox) -> Selection | None:
    """Return what ranks that share need of a tensor, with no gap but those within it; None: all of it."""
    nbytes = wanted.stored.end - wanted.stored.start
    if wanted.box is None or nbytes <= GAPS[0].between_records:
        return None
    gaps = Gaps(0, GAPS[0].within_box)
    return select_box(packed_shape(wanted.stored), wanted.box, element_bytes(wanted.stored), nbytes, (0, 0), gaps)
