"""Reader of boxes of tensors, a batch at a time, for programs that go through a checkpoint in bounded memory.

The converters use it. Each batch is a load of its own; all loads read the same version of each file. Items that are not
tensors are not read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.filesystem import S3FileSystem
from mpreader.dcp.loader import DroppingPlanner, read_metadata
from mpreader.dcp.metadata import MetadataRefused
from mpreader.dcp.state import empty_state, errors_as_refused
from mpreader.readers.client import S3Client

if TYPE_CHECKING:
    from typing_extensions import Self

    from mpreader.s3.objects import ObjectInfo

__all__ = ["BatchReader", "TargetBox"]


class TargetBox(NamedTuple):
    """Box of a stored tensor, and the tensor that it is read into.

    Attributes:
        name: Name of the tensor.
        offsets: Index of the first element of the box in the stored tensor.
        target: Tensor of the shape of the box. Its type may differ from the stored one.
    """

    name: str
    offsets: tuple[int, ...]
    target: torch.Tensor


class BatchReader:
    """Reader of the tensors of one checkpoint, box by box; a context manager. One thread at a time may use it.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        options: Options of the loads.

    Attributes:
        uri: URI of the checkpoint.

    Raises:
        MpreaderError: As for :func:`~mpreader.dcp.load_checkpoint`.
    """

    def __init__(self, uri: str | os.PathLike[str], options: LoadOptions) -> None:
        self.uri = os.fspath(uri)
        self._reader = options.open_reader(uri)
        fs = cast("S3FileSystem", self._reader.fs)
        fs.client = _SteadyClient(options.region, s3client_config=options.s3client_config)
        self._verified = self._unverified = 0
        try:
            self._metadata = read_metadata(self._reader)
        except BaseException:
            self._reader.close()
            raise

    def items(self, match: str | Iterable[str] | None = None) -> dict[str, torch.Tensor | None]:
        """Return the items whose names match: tensors on the meta device, None for those that are no tensors.

        Raises:
            PlanError: The checkpoint has items, but none of them matches.
            MetadataRefused: The description of an item is invalid.
        """
        return empty_state(self._metadata, match)

    def rows_of(self, name: str) -> int:
        """Return the largest number of rows that a chunk of the tensor has; at least 1."""
        with errors_as_refused(self._metadata):
            chunks = cast("TensorStorageMetadata", self._metadata.state_dict_metadata[name]).chunks
            return max([1, *(chunk.sizes[0] for chunk in chunks if chunk.sizes)])

    def read(self, boxes: Sequence[TargetBox]) -> None:
        """Read boxes into their targets; those without elements are passed over.

        Raises:
            MetadataRefused: ``.metadata`` does not say where all bytes of a box are.
            MpreaderError: As for :func:`~mpreader.dcp.load_checkpoint`.
        """
        boxes = [box for box in boxes if box.target.numel()]
        if not boxes:
            return
        reader, metadata = self._reader, self._metadata
        with errors_as_refused(metadata):
            plan = LoadPlan([item for box in boxes for item in self._items_of(box)])
        planner = _BoxPlanner(boxes)
        planner.set_up_planner({}, metadata, is_coordinator=True)
        reader.reset()  # notes that this thread has begun a load
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = reader.prepare_global_plan([reader.prepare_local_plan(plan)])[0]
        reader.read_data(plan, planner).wait()
        stats = reader.stats
        self._verified += stats.verified_bytes
        self._unverified += stats.unverified_bytes

    @property
    def checked_nbytes(self) -> tuple[int, int]:
        """Bytes whose checksums were compared so far, and bytes for which that was not possible."""
        return self._verified, self._unverified

    def close(self) -> None:
        """End the downloads and leave the worker pool. Idempotent."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _items_of(self, box: TargetBox) -> list[ReadItem]:
        entry = self._metadata.state_dict_metadata[box.name]
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"{box.name!r} is no tensor")
        chunk = ChunkStorageMetadata(torch.Size(box.offsets), box.target.size())
        items = create_read_items_for_chunk_list(box.name, entry, [chunk])
        for item in items:  # a KeyError here is reported as MetadataRefused
            cast("Mapping[MetadataIndex, Any]", self._metadata.storage_data)[item.storage_index]
        # What no chunk covers would be left as it was in memory.
        if sum(math.prod(item.lengths) for item in items) < box.target.numel():
            raise MetadataRefused(f"the checkpoint's .metadata does not say where all of {box.name!r} is stored")
        return items


class _BoxPlanner(DroppingPlanner):
    """Planner whose targets are those of boxes."""

    def __init__(self, boxes: Iterable[TargetBox]) -> None:
        super().__init__()
        self._targets = {MetadataIndex(box.name, torch.Size(box.offsets)): box.target for box in boxes}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._targets[index]  # an index of the same name and offsets is equal


class _SteadyClient(S3Client):
    """S3 client that sends one HEAD for each object, so that all loads read the same version of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._infos: dict[tuple[str, str], ObjectInfo] = {}

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        known = self._infos.get((bucket, key))
        # setdefault: two threads that ask at the same time get the same answer.
        return known or self._infos.setdefault((bucket, key), super().head_object(bucket, key))
