"""What an item's loader believes of memory that may not be this rank's any more."""

from __future__ import annotations

import io
from typing import NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from mpreader.dcp.items import ItemLoader, LoadedBytes
from mpreader.dcp.planned import PlannedItem
from mpreader.formats.selection import Run, Selection
from mpreader.formats.torch_save import BufferItem
from mpreader.pool.hosts.messages import HostLost

URI = "s3://bucket/run/__0_0.distcp"
FRONT_NBYTES = 1000


class Stored(NamedTuple):
    relative_path: str
    offset: int
    length: int


class Memory(BufferItem):
    """Memory of an item of which only its front was received."""

    def holds(self, start: int, end: int) -> bool:
        return end <= FRONT_NBYTES


class Reader:
    """Reader of a file, in whose memory there is something else by now."""

    def __init__(self, memory: bytes) -> None:
        self._memory = Memory(bytearray(memory))

    def item(self, offset: int, length: int) -> Memory:
        raise NotImplementedError

    def refetch(self, offset: int, length: int) -> Memory:
        raise NotImplementedError

    def selected_item(self, offset: int, length: int, first: int) -> Memory:
        return self._memory


def record_of(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def lose_host() -> None:
    raise HostLost("this rank was silent for too long")


@pytest.mark.parametrize(
    "memory", [record_of(torch.zeros(500, 80)), bytes(50_000)], ids=["another record", "no record"]
)
def test_layout_is_not_believed_if_the_memory_of_the_front_was_given_to_others(memory: bytes) -> None:
    # Else what is to be received in place of the box would follow from the layout of another record, and nothing that
    # comes later could tell.
    index = MetadataIndex("weight", [0, 0])
    box = ReadItem(LoadItemType.TENSOR, index, torch.Size([0, 0]), index, torch.Size([100, 0]), torch.Size([10, 100]))
    item = PlannedItem(box, Stored("__0_0.distcp", 0, len(memory)), Selection(FRONT_NBYTES, (Run(40_000, 44_000),), 0))
    loader = ItemLoader(DefaultLoadPlanner(), None, verify=True, loaded=LoadedBytes(), check_held=lose_host)
    with pytest.raises(HostLost, match="silent"):
        loader.load(item, URI, Reader(memory))
    loader.leave_host()
    assert loader.load(item, URI, Reader(memory)) is not None, "it is received in another way"
