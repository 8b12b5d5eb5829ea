"""Counts of a load, by the names that the commands print and write as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpreader.pool.stats import PoolStats

__all__ = ["LoadCounts", "counts_of"]


@dataclass(frozen=True, slots=True)
class LoadCounts:
    """Counts of one load, as the storage reader has made them.

    Attributes:
        received_nbytes: Bytes that were received, gaps and repetitions included; of ranks that share a host, by the one
            that has received them for all.
        over_read_nbytes: Bytes received that belong to no item.
        requests: GETs made, those of ``.metadata`` not included.
        retries: GETs that were made again.
        slow_cut: GETs that were cut, since they were much slower than others.
        network_wait_s: Seconds during which the load waited for bytes.
        consumer_wait_s: Seconds during which nothing was received, since memory was full of bytes not taken yet.
        verified_nbytes: Bytes of the items whose checksum was compared; those around the tensors' own are included.
        unverified_nbytes: Bytes of the other items: all of them where that was not asked for, else those that were
            saved without checksums, or of which a part was received only.
    """

    received_nbytes: int
    over_read_nbytes: int
    requests: int
    retries: int
    slow_cut: int
    network_wait_s: float
    consumer_wait_s: float
    verified_nbytes: int
    unverified_nbytes: int


def counts_of(stats: PoolStats) -> dict[str, Any]:
    """Return the fields of :class:`LoadCounts` by their names, for a class that has more of them."""
    return {
        "received_nbytes": stats.bytes,
        "over_read_nbytes": stats.over_read,
        "requests": stats.requests,
        "retries": stats.retries,
        "slow_cut": stats.slow_cut,
        "network_wait_s": stats.seconds,
        "consumer_wait_s": stats.consumer_seconds,
        "verified_nbytes": stats.verified_bytes,
        "unverified_nbytes": stats.unverified_bytes,
    }
