"""Converter of safetensors files to a DCP checkpoint on S3, in bounded memory.

Users and the command ``convert`` call :func:`safetensors_to_dcp`. The steps are those of a save by
``torch.distributed.checkpoint`` in one process, except that each tensor is loaded only when it is written::

    headers ──► plan of the save: a chunk for each piece
    files ── batch of pieces ──► buffer ── a record of each piece ──► .distcp       each piece's CRC is noted
    .metadata, which makes it a checkpoint
    checkpoint ── read back, batch by batch ──► CRCs compared
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mpreader.dcp.batches import BatchReader, TargetBox
from mpreader.dcp.checkpoint import LoadOptions
from mpreader.errors import ChecksumMismatch, ConfigError, MpreaderError
from mpreader.fetch.safetensors import FileFetcher, fetcher_of, files_of, opened
from mpreader.formats.crc import crc32
from mpreader.formats.safetensors import packed_shape
from mpreader.formats.torch_tensors import layout_of, torch_dtype
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.safetensors.conversion.ahead import loaded_ahead
from mpreader.safetensors.conversion.pieces import Piece
from mpreader.safetensors.conversion.result import Conversion
from mpreader.safetensors.conversion.sources import BatchBuffers, Source, bytes_of, source_batches, sources_of
from mpreader.safetensors.conversion.streaming_writer import StreamingWriter
from mpreader.safetensors.fill import fill
from mpreader.safetensors.index import BoxIndex
from mpreader.safetensors.wanted import WantedTensor
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["safetensors_to_dcp"]


def safetensors_to_dcp(
    uri: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    region: str | None = None,
    headers: Mapping[str, str] | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    match: str | Iterable[str] | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: bool | None = None,
) -> Conversion:
    """Convert safetensors files to a DCP checkpoint, in some hundred MB of memory whatever their size.

    ``torch.distributed.checkpoint.load`` loads the checkpoint, into any shards. Its items have the names of
    the tensors.

    Args:
        uri: A file, or a directory with or without ``model.safetensors.index.json``, as for
            :func:`mpreader.safetensors.load_checkpoint`.
        target: ``s3://`` URI of the checkpoint.
        region: The bucket's region. None: the configuration's, or the environment's.
        headers: HTTP headers for a web server; see :func:`mpreader.safetensors.load_file`.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        match: Patterns of the names of tensors, as for :func:`mpreader.dcp.load_checkpoint`. None: all.
        verify: True reads the checkpoint back and compares it with what was loaded.
        overwrite: True replaces an existing checkpoint. False: that is an error.
        progress: True shows a progress bar on stderr, False shows none. None: on a terminal or in a notebook.

    Returns:
        What was written.

    Raises:
        HeaderRefused: A header is damaged, or contradicts the length of its file.
        PlanError: A tensor has a type that torch lacks, nothing matches, the index is damaged, or two files have a
            tensor of the same name.
        ConfigError: There is a checkpoint at ``target`` already, or an argument is wrong.
        ChecksumMismatch: The checkpoint that was read back differs from what was written.
        ObjectMissing: There is no such file.
        TransportError: S3 or a web server refused, or could not be reached.

    After an error there is no new checkpoint; one that was to be replaced is gone once writing has begun.
    """
    target = os.fspath(target)
    if not target.startswith("s3://"):
        raise ConfigError(f"checkpoints of DCP are written to S3 only: write s3://bucket/key, not {target!r}")
    source = os.fspath(uri)
    with contextlib.ExitStack() as stack:
        writer = StreamingWriter(region, target, s3client_config)
        stack.callback(writer.close)
        config = writer.s3client_config
        fetcher = fetcher_of(source, config, pool_config, headers)
        stack.callback(fetcher.close)
        files = stack.enter_context(opened(fetcher, files_of(fetcher, source)))
        sources = sources_of(files, match)
        nbytes = sum(each.stored.end - each.stored.start for each in sources.values())
        writer.claim(overwrite=overwrite)
        try:
            with progress_bar(nbytes * (2 if verify else 1), "convert", show=progress) as bar:
                written = _save(writer, sources, fetcher, bar)
                if verify:
                    with BatchReader(target, _options(region, config, pool_config)) as reader:
                        _verify(reader, sources, written, bar)
        except BaseException:
            writer.discard()
            raise
        return Conversion(
            files=tuple(writer.written),
            nbytes=nbytes,
            tensors=len(sources),
            left_out=(),
            checked_nbytes=0,
            is_verified=verify,
        )


def _options(region: str | None, config: S3ClientConfig, pool_config: PoolConfig | None) -> LoadOptions:
    """Return the options of the loads that read the checkpoint back."""
    return LoadOptions(
        region=region,
        s3client_config=config,
        pool_config=pool_config,
        max_gap_size=DEFAULT_MAX_GAP_SIZE,
        match=None,
        verify=True,
        weights_only=True,
        allowed_globals=(),
        progress=False,
        share_host=False,
    )


# -- save


Loaded = tuple[Sequence[Piece], Sequence[torch.Tensor]]
"""Batch of pieces, and a tensor for each of them."""


def _save(
    writer: StreamingWriter, sources: Mapping[str, Source], fetcher: FileFetcher, bar: Progress
) -> dict[Piece, int]:
    """Write the checkpoint, and return the CRC-32 of each piece."""
    buffers = BatchBuffers(sources)

    def load(batch: list[Piece]) -> Loaded:
        tensors = buffers.tensors(batch)
        wanted = [_wanted(sources[piece.name], piece, one) for piece, one in zip(batch, tensors, strict=True)]
        fill(fetcher, wanted, progress=False)
        return batch, tensors

    with contextlib.closing(loaded_ahead(load, source_batches(sources))) as loaded:
        planner = _Planner(sources, loaded, bar)
        plan = planner.create_local_plan()
        writer.reset()
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(plan)])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    return planner.written


def _wanted(source: Source, piece: Piece, target: torch.Tensor) -> WantedTensor:
    """Return a piece as a load takes it."""
    return WantedTensor(
        source.file, source.stored, layout_of(source.stored), BoxIndex(piece.offsets, piece.sizes), target
    )


class _Planner(DefaultSavePlanner):
    """Planner of a save whose tensors exist one after the other, each only while it is written.

    Args:
        sources: The tensors.
        loaded: Their pieces, in the order of the plan.
        bar: Counts what is written.

    Attributes:
        written: CRC-32 of each piece that was handed out.
    """

    def __init__(self, sources: Mapping[str, Source], loaded: Iterator[Loaded], bar: Progress) -> None:
        super().__init__()
        self._sources = sources
        self._tensors = _pieces_in(loaded)
        self._bar = bar
        self.written: dict[Piece, int] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan a chunk for each piece."""
        items = [self._item(piece) for batch in source_batches(self._sources) for piece in batch]
        # Each name has a path within the state, by which torch's own converters make a dictionary of it.
        return SavePlan(items, planner_data={name: (name,) for name in self._sources})

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the next piece, valid until the first piece of the next batch is asked for."""
        piece, tensor = next(self._tensors)
        if MetadataIndex(piece.name, torch.Size(piece.offsets)) != write_item.index:
            raise MpreaderError(f"torch asks for {write_item.index} when it is the turn of {piece.name!r}")
        self.written[piece] = crc32(bytes_of(tensor))
        self._bar.advance(piece.nbytes)
        return tensor

    def _item(self, piece: Piece) -> WriteItem:
        stored = self._sources[piece.name].stored
        size, offsets = torch.Size(packed_shape(stored)), torch.Size(piece.offsets)
        chunk = ChunkStorageMetadata(offsets, torch.Size(piece.sizes))
        kind = WriteItemType.TENSOR if chunk.sizes == size else WriteItemType.SHARD
        data = TensorWriteData(chunk, TensorProperties(dtype=torch_dtype(stored)), size)
        return WriteItem(MetadataIndex(piece.name, offsets), kind, tensor_data=data)


def _pieces_in(loaded: Iterator[Loaded]) -> Generator[tuple[Piece, torch.Tensor], None, None]:
    for batch, tensors in loaded:
        yield from zip(batch, tensors, strict=True)


# -- verify


def _verify(reader: BatchReader, sources: Mapping[str, Source], written: Mapping[Piece, int], bar: Progress) -> None:
    """Read a checkpoint back and compare it with what was written.

    Raises:
        ChecksumMismatch: They differ.
    """
    buffers = BatchBuffers(sources)

    def load(batch: list[Piece]) -> Loaded:
        tensors = buffers.tensors(batch)
        reader.read(
            [TargetBox(piece.name, piece.offsets, tensor) for piece, tensor in zip(batch, tensors, strict=True)]
        )
        return batch, tensors

    with contextlib.closing(loaded_ahead(load, source_batches(sources))) as loaded:
        for piece, tensor in _pieces_in(loaded):
            if crc32(bytes_of(tensor)) != written[piece]:
                raise ChecksumMismatch(f"{reader.uri}: tensor {piece.name!r} differs from what was written")
            bar.advance(piece.nbytes)
