"""Converter of safetensors files to a checkpoint of DCP on S3, in bounded memory.

Users and the command ``convert`` call :func:`safetensors_to_dcp`. The steps are those of a save by
``torch.distributed.checkpoint`` in one process, whose tensors are loaded when they are written::

    headers ──► plan of the save: a chunk for each piece
    files ── batch of pieces ──► buffer ── a record of each piece ──► .distcp       each piece's CRC is noted
    .metadata, which makes it a checkpoint
    checkpoint ── read back, batch by batch ──► CRCs compared
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from mpreader.config import MiB
from mpreader.dcp.batches import BatchReader, Box
from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.state import name_patterns
from mpreader.errors import ChecksumMismatch, ConfigError, MpreaderError, PlanError
from mpreader.fetch.safetensors import FileFetcher, StoredFile, fetcher_of, files_of, opened
from mpreader.formats.crc import crc32
from mpreader.formats.safetensors import BITS, StoredTensor, packed_shape
from mpreader.formats.torch_tensors import torch_dtype
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.safetensors.conversion import BATCH_BYTES, Conversion, loaded_ahead
from mpreader.safetensors.pieces import Piece, batches_of, pieces_of
from mpreader.safetensors.streaming_writer import StreamingWriter
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["safetensors_to_dcp"]

_ALIGNMENT: Final = 64  # of the pieces in a buffer
_RANGE_BYTES: Final = MiB


class _Source(NamedTuple):
    """A tensor that is converted, and the file that it is in."""

    file: StoredFile
    stored: StoredTensor


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
    """Convert safetensors files to a checkpoint of DCP; the memory that it takes does not grow with them.

    ``torch.distributed.checkpoint.load`` reads the checkpoint, into any shards. Its names are those of the files.

    Args:
        uri: A file, or a directory with or without ``model.safetensors.index.json``, as for
            :func:`mpreader.safetensors.load_checkpoint`.
        target: ``s3://`` URI of the checkpoint.
        region: The bucket's region. None: the configuration's, or the environment's.
        headers: Headers for a web server.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        match: Patterns of the names of tensors, as for :func:`mpreader.dcp.load_checkpoint`. None: all.
        verify: True reads the checkpoint back and compares it with what was loaded.
        overwrite: True replaces a checkpoint; False: one that is there is an error.
        progress: True shows a progress bar on stderr, False shows none. None: on a terminal or in a notebook.

    Returns:
        What was written.

    Raises:
        HeaderRefused: A header is damaged, or contradicts the length of its file.
        PlanError: A tensor has a type that torch does not know, or nothing matches.
        ConfigError: There is a checkpoint at ``target``, or an argument is wrong.
        ChecksumMismatch: What was written came back otherwise.
        ObjectMissing: There is no such file.
        TransportError: S3 or a web server refused, or could not be reached.

    After an error no new checkpoint is there, nor one that was to be replaced.
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
        sources = _sources(files, match)
        nbytes = sum(each.stored.end - each.stored.start for each in sources.values())
        writer.claim(overwrite=overwrite)
        try:
            with progress_bar(nbytes * (2 if verify else 1), "convert", show=progress) as bar:
                written = _save(writer, sources, fetcher, bar)
                if verify:
                    options = LoadOptions(
                        region, config, pool_config, DEFAULT_MAX_GAP_SIZE, None, True, True, (), False, False
                    )
                    _verify(target, options, sources, written, bar)
        except BaseException:
            writer.discard()
            raise
        return Conversion(tuple(writer.written), nbytes, len(sources), (), 0, is_verified=verify)


def _sources(files: Sequence[StoredFile], match: str | Iterable[str] | None) -> dict[str, _Source]:
    """Return the tensors that are wanted by their names, in the order of their bytes."""
    patterns = name_patterns(match)
    sources = {
        stored.name: _Source(file, stored)
        for file in files
        for stored in file.header.tensors.values()
        if patterns is None or any(fnmatchcase(stored.name, pattern) for pattern in patterns)
    }
    if not sources:
        raise PlanError(f"no tensor in {files[0].uri} or beside it" + (f" matches {match!r}" if match else ""))
    for file, stored in sources.values():
        if BITS[stored.dtype] < 8 and not (stored.dtype == "F4" and stored.shape and not stored.shape[-1] % 2):
            raise PlanError(
                f"{file.uri}: tensor {stored.name!r} is {stored.dtype} of shape {stored.shape}, for which torch has no "
                "type; select others (match=, --match)"
            )
        torch_dtype(stored)  # refuses what this torch does not know
    return sources


def _batches(sources: Mapping[str, _Source]) -> Iterator[list[Piece]]:
    pieces = (
        piece
        for _, stored in sources.values()
        for piece in pieces_of(stored.name, packed_shape(stored), torch_dtype(stored).itemsize, max_bytes=BATCH_BYTES)
    )
    return batches_of(pieces, max_bytes=BATCH_BYTES)


class _Buffers:
    """Two buffers, for the pieces of two batches; one is filled while the other one is read.

    Args:
        sources: Tensors that the pieces belong to.
    """

    def __init__(self, sources: Mapping[str, _Source]) -> None:
        self._sources = sources
        sizes = [sum(_padded(piece.nbytes) for piece in batch) for batch in _batches(sources)]
        self._views = itertools.cycle([_bytes_of(torch.empty(max(sizes), dtype=torch.uint8)) for _ in sizes[:2]])

    def tensors(self, batch: Sequence[Piece]) -> list[torch.Tensor]:
        """Return a tensor for each piece, with a storage of its own size: torch saves whole storages."""
        view, at = next(self._views), 0
        tensors = []
        for piece in batch:
            dtype = torch_dtype(self._sources[piece.name].stored)
            if piece.nbytes:
                data = torch.frombuffer(view[at : at + piece.nbytes], dtype=torch.uint8)
                tensors.append(data.view(dtype).view(piece.sizes))
            else:
                tensors.append(torch.empty(piece.sizes, dtype=dtype))
            at += _padded(piece.nbytes)
        return tensors


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# -- save


Loaded = tuple[Sequence[Piece], Sequence[torch.Tensor]]


def _save(
    writer: StreamingWriter, sources: Mapping[str, _Source], fetcher: FileFetcher, bar: Progress
) -> dict[Piece, int]:
    """Write the checkpoint, and return the CRC of each piece."""
    buffers = _Buffers(sources)

    def load(batch: list[Piece]) -> Loaded:
        tensors = buffers.tensors(batch)
        _fetch(fetcher, sources, batch, tensors)
        return batch, tensors

    with contextlib.closing(loaded_ahead(load, _batches(sources))) as loaded:
        planner = _Planner(sources, loaded, bar)
        plan = planner.create_local_plan()
        writer.reset()
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([writer.prepare_local_plan(plan)])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        results = writer.write_data(plan, planner).wait()
    writer.finish(metadata, [results])
    return planner.written


def _fetch(
    fetcher: FileFetcher, sources: Mapping[str, _Source], batch: Sequence[Piece], tensors: Sequence[torch.Tensor]
) -> None:
    """Read pieces into tensors, in ranges that are small beside the memory of the fetcher."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    targets: dict[str, list[memoryview]] = {}
    for piece, tensor in zip(batch, tensors, strict=True):
        file, stored = sources[piece.name]
        start, view = stored.start + piece.start, _bytes_of(tensor)
        for at in range(0, piece.nbytes, _RANGE_BYTES):
            target = view[at : at + _RANGE_BYTES]
            ranges.setdefault(file.source, []).append((start + at, start + at + len(target)))
            targets.setdefault(file.source, []).append(target)
    if ranges:
        with contextlib.closing(fetcher.stream_many(ranges)) as stream:
            for source, index, view in stream:
                targets[source][index][:] = view
                del view  # or its memory would be held until the next one has come


class _Planner(DefaultSavePlanner):
    """Planner of a save whose tensors are there when they are written, one after the other.

    Args:
        sources: The tensors.
        loaded: Their pieces, in the order of the plan.
        bar: Counts what is written.

    Attributes:
        written: CRC of each piece that was handed out.
    """

    def __init__(self, sources: Mapping[str, _Source], loaded: Iterator[Loaded], bar: Progress) -> None:
        super().__init__()
        self._sources = sources
        self._tensors = _pieces_in(loaded)
        self._bar = bar
        self.written: dict[Piece, int] = {}

    def create_local_plan(self) -> SavePlan:
        """Plan a chunk for each piece."""
        items = [self._item(piece) for batch in _batches(self._sources) for piece in batch]
        # Each name has a path within the state, by which torch's own converters make a dictionary of it.
        return SavePlan(items, planner_data={name: (name,) for name in self._sources})

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the next piece, which is valid until the next call but one."""
        piece, tensor = next(self._tensors)
        if MetadataIndex(piece.name, torch.Size(piece.offsets)) != write_item.index:
            raise MpreaderError(f"{write_item.index} is written when it is the turn of {piece.name!r}")
        self.written[piece] = crc32(_bytes_of(tensor))
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


def _verify(
    uri: str, options: LoadOptions, sources: Mapping[str, _Source], written: Mapping[Piece, int], bar: Progress
) -> None:
    """Read a checkpoint back.

    Raises:
        ChecksumMismatch: It is not what was written.
    """
    buffers = _Buffers(sources)
    with BatchReader(uri, options) as reader:

        def load(batch: list[Piece]) -> Loaded:
            tensors = buffers.tensors(batch)
            reader.read([Box(piece.name, piece.offsets, tensor) for piece, tensor in zip(batch, tensors, strict=True)])
            return batch, tensors

        with contextlib.closing(loaded_ahead(load, _batches(sources))) as loaded:
            for piece, tensor in _pieces_in(loaded):
                if crc32(_bytes_of(tensor)) != written[piece]:
                    raise ChecksumMismatch(f"{uri}: tensor {piece.name!r} was read back otherwise than it was written")
                bar.advance(piece.nbytes)
