"""Converter of a DCP checkpoint on S3 to safetensors files, on S3 or on a local disk, in bounded memory.

Users and the command ``convert`` call :func:`dcp_to_safetensors`. Bytes go through two buffers: one is filled while the
other one is written::

    metadata ──► shards: which tensors in which file ──► header of each file
    checkpoint ── batch of pieces ──► buffer ──► file                        each piece's CRC is noted
    file ── read back ──► CRCs compared ──► index, which makes the files a checkpoint

This module writes, reads back and compares. What is in which file is decided in
:mod:`mpreader.safetensors.conversion.shards`; where the files are is known to
:mod:`mpreader.safetensors.conversion.targets`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from mpreader.config import MiB
from mpreader.dcp.batches import BatchReader, TargetBox
from mpreader.dcp.checkpoint import LoadOptions
from mpreader.errors import ChecksumMismatch, ConfigError
from mpreader.fetch.safetensors import INDEX
from mpreader.formats.crc import crc32
from mpreader.formats.safetensors_header import DEFAULT_MAX_SHARD_SIZE
from mpreader.formats.torch_tensors import TORCH_DTYPES
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.safetensors.conversion.ahead import loaded_ahead
from mpreader.safetensors.conversion.pieces import Piece
from mpreader.safetensors.conversion.result import Conversion
from mpreader.safetensors.conversion.shards import Batch, ShardFile, batches_of_files, dtype_of, shard_files, specs_of
from mpreader.safetensors.conversion.targets import Target, open_target
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["dcp_to_safetensors"]

_BLOCK_BYTES: Final = MiB  # of what is read back


class _Written(NamedTuple):
    """Bytes of a file that were written, of the header or of a piece of a tensor.

    Attributes:
        start: First byte in the file.
        end: End of the bytes, exclusive.
        crc: CRC-32 of what was written.
        what: What the bytes are, for an error.
    """

    start: int
    end: int
    crc: int
    what: str


def dcp_to_safetensors(
    uri: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    skip_other: bool = False,
    verify: bool = True,
    allowed_globals: Iterable[str] = (),
    overwrite: bool = False,
    progress: bool | None = None,
) -> Conversion:
    """Convert a DCP checkpoint to safetensors files, in some hundred MB of memory whatever the size of the checkpoint.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        target: ``s3://`` URI or local path to write to: a directory, or one file whose name ends with
            ``.safetensors``.
        region: The buckets' region. None: the configuration's, or the environment's.
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool.
        max_gap_size: Largest gap, in bytes, between two items that are fetched together; the gap is received too.
        match: Patterns of the names of items, as for :func:`mpreader.dcp.load_checkpoint`. None: everything.
        dtype: Type that tensors of float64, float32, float16 and bfloat16 are converted to, or its name, such as
            ``"bfloat16"``; all others are kept. None: no tensor is converted.
        max_shard_size: Largest number of bytes of the tensors in one file of a directory, at least 1. A larger tensor
            gets a file of its own. Ignored for a single file.
        skip_other: True leaves out items that are not tensors, which safetensors files can't hold. False: they are an
            error.
        verify: True checks the checksums of the checkpoint, reads all files back and compares them with what was
            loaded.
        allowed_globals: Names of classes that ``.metadata`` may use besides those of DCP.
        overwrite: True replaces all safetensors files of the target. False: they are an error.
        progress: True shows a progress bar on stderr, False shows none. None: on a terminal or in a notebook.

    Returns:
        What was written, and what was left out.

    Raises:
        PlanError: An item can't be stored, nothing matches, or the local disk is too small.
        ConfigError: The target has safetensors files already, or can't be written to; or an argument is wrong.
        ChecksumMismatch: The checkpoint is damaged, or a file that was read back differs from what was written.
        MetadataRefused: ``.metadata`` is damaged.
        TransportError: S3 refused, or could not be reached.
        OSError: A local file can't be written.

    After an error none of the new files is left. Files that ``overwrite`` was to replace are still there in a local
    folder; on S3 their index is gone, and those that had the name of a new file may be.
    """
    if max_shard_size < 1:
        raise ConfigError(f"max_shard_size must be at least 1 byte, got {max_shard_size}")
    wanted_dtype = dtype_of(dtype)
    options = LoadOptions(
        region=region,
        s3client_config=s3client_config,
        pool_config=pool_config,
        max_gap_size=max_gap_size,
        match=match,
        verify=verify,
        weights_only=True,
        allowed_globals=allowed_globals,
        progress=False,
        share_host=False,
    )
    with (
        open_target(os.fspath(target), region, s3client_config, pool_config) as opened,
        BatchReader(uri, options) as source,
    ):
        specs, left_out = specs_of(source.items(match), wanted_dtype, skip_other=skip_other)
        files = shard_files(specs, opened.file_name, max_shard_size)
        with _committed(opened, files, overwrite=overwrite) as nbytes:
            with progress_bar(nbytes * (2 if verify else 1), "convert", show=progress) as bar:
                written = _write(files, opened, source, bar)
                if verify:
                    _verify(files, written, opened, bar)
            names = [file.name for file in files]
            if len(files) > 1:
                names.append(_write_index(files, opened))
        return Conversion(
            files=tuple(map(opened.uri, names)),
            nbytes=nbytes,
            tensors=len(specs),
            left_out=left_out,
            checked_nbytes=source.checked_nbytes[0],
            is_verified=verify,
        )


@contextlib.contextmanager
def _committed(target: Target, files: Sequence[ShardFile], *, overwrite: bool) -> Iterator[int]:
    """Commit a target at the end of the context, or discard it after an error; yields the bytes of the files."""
    nbytes = sum(file.header.file_nbytes for file in files)
    try:
        target.begin([file.name for file in files], nbytes, overwrite=overwrite)
        yield nbytes
        target.commit()
    except BaseException:
        target.discard()
        raise


# -- write


def _write(files: Sequence[ShardFile], target: Target, source: BatchReader, bar: Progress) -> dict[str, list[_Written]]:
    """Write all files, and return what was written, by the names of the files."""
    dtypes = {stored.name: TORCH_DTYPES[stored.dtype] for file in files for stored in file.header.tensors}
    planned = list(batches_of_files(files, source.rows_of))
    sizes = [batch.end - batch.start for batch in planned]
    buffers = itertools.cycle([torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes[:2]])

    def load(batch: Batch) -> tuple[Batch, memoryview]:
        buffer = next(buffers)[: batch.end - batch.start]
        parts = [(piece, _part(buffer, at - batch.start, piece, dtypes[piece.name])) for piece, at in batch.pieces]
        source.read([TargetBox(piece.name, piece.offsets, part) for piece, part in parts])
        return batch, buffer.numpy().data

    written: dict[str, list[_Written]] = {}
    with contextlib.closing(loaded_ahead(load, planned)) as loaded:
        for file, batches in itertools.groupby(loaded, key=lambda each: each[0].file):
            header = file.header.data
            written[file.name] = [_Written(0, len(header), crc32(header), "the header")]
            with target.create(file.name) as stream:
                stream.write(header)
                bar.advance(len(header))
                for batch, data in batches:
                    written[file.name] += _checksums(batch, data)
                    stream.write(data)
                    bar.advance(len(data))
    return written


def _part(buffer: torch.Tensor, at: int, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """Return a piece as a view of the buffer, from its byte ``at`` on."""
    return buffer[at : at + piece.nbytes].view(dtype).view(piece.sizes)


def _checksums(batch: Batch, data: memoryview) -> Iterator[_Written]:
    for piece, at in batch.pieces:
        end = at + piece.nbytes
        crc = crc32(data[at - batch.start : end - batch.start])
        yield _Written(at, end, crc, f"tensor {piece.name!r}")


def _write_index(files: Sequence[ShardFile], target: Target) -> str:
    owners = {stored.name: file.name for file in files for stored in file.header.tensors}
    nbytes = sum(file.header.file_nbytes - len(file.header.data) for file in files)
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(owners.items()))}
    with target.create(INDEX) as stream:
        stream.write(json.dumps(index, indent=2).encode() + b"\n")
    return INDEX


# -- verify


def _verify(
    files: Iterable[ShardFile], written: Mapping[str, Sequence[_Written]], target: Target, bar: Progress
) -> None:
    """Read files back and compare them with what was written.

    Raises:
        ChecksumMismatch: They differ.
    """
    for file in files:
        parts = [part for part in written[file.name] if part.end > part.start]
        ranges = [each for part in parts for each in _blocks(part)]
        with contextlib.closing(target.blocks(file.name, ranges)) as blocks:
            for part in parts:
                crc = 0
                for block in itertools.islice(blocks, len(_blocks(part))):
                    crc = crc32(block, crc)
                    bar.advance(len(block))
                if crc != part.crc:
                    raise ChecksumMismatch(
                        f"{target.uri(file.name)}: {part.what} differs from what was written",
                        key=file.name,
                        range=(part.start, part.end),
                    )


def _blocks(part: _Written) -> list[tuple[int, int]]:
    """Return the ranges in which a part is read back; none if it is empty."""
    return [(at, min(at + _BLOCK_BYTES, part.end)) for at in range(part.start, part.end, _BLOCK_BYTES)]
