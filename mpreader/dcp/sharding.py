"""Sharding: the plan of each rank of a job that loads every tensor of a checkpoint in shards.

The inspection uses it. It divides tensors as ``torch.distributed.tensor.Shard`` does, without a process group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mpreader.dcp.state import errors_as_refused, plan_whole
from mpreader.formats.selection import shard_box

__all__ = ["plan_shard", "shard_bytes", "shard_of"]


def shard_of(size: torch.Size, dim: int, rank: int, ranks: int) -> ChunkStorageMetadata:
    """Returns the shard of a tensor that a rank has.

    Args:
        size: Shape of the tensor.
        dim: Dimension that is divided. A tensor that does not have it is on all ranks, whole.
        rank: The rank.
        ranks: Number of ranks.
    """
    box = shard_box(size, dim, rank, ranks)
    return ChunkStorageMetadata(torch.Size(offset for offset, _ in box), torch.Size(length for _, length in box))


def shard_bytes(state: Mapping[str, Any], dim: int, rank: int, ranks: int) -> int:
    """Returns the number of bytes of the shards that a rank has of the tensors of ``state``."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(shard_of(value.size(), dim, rank, ranks).sizes.numel() * value.dtype.itemsize for value in tensors)


def plan_shard(metadata: Metadata, state: Mapping[str, Any], dim: int, rank: int, ranks: int) -> LoadPlan:
    """Plan the reads of one rank, which loads its shards of all tensors of ``state``, and all other items.

    Raises:
        MetadataRefused: The description of an item is invalid, or there is no location of its bytes.
    """
    others = {fqn: value for fqn, value in state.items() if not isinstance(value, torch.Tensor)}
    items = list(plan_whole(metadata, others).items)
    with errors_as_refused(metadata):
        for fqn, value in state.items():
            if isinstance(value, torch.Tensor):
                shard = shard_of(value.size(), dim, rank, ranks)
                if shard.sizes.numel():
                    entry: Any = metadata.state_dict_metadata[fqn]
                    items += create_read_items_for_chunk_list(fqn, entry, [shard])
        for item in items:
            metadata.storage_data[item.storage_index]
    return LoadPlan(items)
