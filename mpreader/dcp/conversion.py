"""Converter of a checkpoint on S3 to one local file for ``torch.load``.

Users and the command ``convert`` call :func:`dcp_to_torch_save`. The file must not appear before it is complete:
it is written under another name in the same folder, and renamed when all of it is on the disk. The file is created
before the load, so that a folder without write permission is found before anything is downloaded, not afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from mpreader.dcp.checkpoint import LoadOptions, load_state
from mpreader.dcp.state import state_bytes
from mpreader.errors import ConfigError, PlanError
from mpreader.files import errors_naming, whole_file
from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.telemetry.progress import Progress, progress_bar

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["dcp_to_torch_save"]


def dcp_to_torch_save(  # noqa: D417  # most arguments are explained at load_checkpoint
    uri: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    region: str | None = None,
    s3client_config: S3ClientConfig | None = None,
    pool_config: PoolConfig | None = None,
    max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
    match: str | Iterable[str] | None = None,
    verify: bool = True,
    weights_only: bool = True,
    allowed_globals: Iterable[str] = (),
    overwrite: bool = True,
    progress: bool | None = None,
) -> None:
    """Convert a checkpoint to one local file for ``torch.load``, as torch's function of this name does for a folder.

    The file appears when all of it is on the disk, never in part. The whole state must fit in memory.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        path: Path of the file.
        weights_only: True refuses items that are neither tensors nor of plain types. False unpickles everything, as
            torch's function always does.
        overwrite: True replaces a file of this name, as torch's function does; it is replaced at the end, when the new
            one is complete.
        progress: True shows two progress bars, one for the load and one for the file. None, False: as for
            :func:`load_checkpoint`.

    All other arguments are those of :func:`load_checkpoint`.

    Raises:
        ConfigError: The folder of ``path`` does not exist, ``path`` is a folder or a device, or it is an existing file
            and ``overwrite`` is False.
        PlanError: The disk or the memory has too little free space.
        OSError: The file can't be written.
        MpreaderError: As for :func:`load_checkpoint`.

    After an error no new file is left, and an existing one is unchanged.
    """
    target = _target(path, overwrite=overwrite)
    options = LoadOptions(
        region, s3client_config, pool_config, max_gap_size, match, verify, weights_only, allowed_globals, progress
    )
    with whole_file(target) as file:
        state, nbytes = load_state(uri, options, check=partial(_check_disk, file, target))
        with errors_naming(target), progress_bar(nbytes, "write", show=progress) as bar:
            _write(state, _Counted(file, bar))


class _Counted:
    """File for ``torch.save`` that counts the bytes written to it on a progress bar."""

    def __init__(self, file: BinaryIO, progress: Progress) -> None:
        self._file = file
        self._progress = progress

    def write(self, data: Buffer) -> int:
        written = self._file.write(data)
        self._progress.advance(written)
        return written

    def flush(self) -> None:
        self._file.flush()


def _target(path: str | os.PathLike[str], *, overwrite: bool) -> str:
    """Returns the path of the file to make, with all links followed.

    Raises:
        ConfigError: There can be no file at ``path``, or there is one and ``overwrite`` is False.
    """
    # Links are followed because a rename would replace the link itself. A program that opens the link and writes to it
    # keeps the link, too.
    target = os.path.realpath(path)
    if os.path.exists(target):
        if not os.path.isfile(target):
            raise ConfigError(f"{os.fspath(path)!r} is a folder or a device, not a file")
        if not overwrite:
            raise ConfigError(f"{os.fspath(path)!r} is there already; overwrite=True (--overwrite) replaces it")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise ConfigError(f"there is no folder {folder!r} to write {os.path.basename(target)!r} to; make it first")
    return target


def _check_disk(file: BinaryIO, target: str, state: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit on the disk, before it is downloaded.

    Raises:
        PlanError: The disk has less free space than the tensors take.
    """
    status = os.fstatvfs(file.fileno())
    needed, free = state_bytes(state), status.f_bavail * status.f_frsize
    if needed > free:
        raise PlanError(
            f"{target}: the tensors take {needed} bytes, but only {free} bytes are free on its disk; select some of "
            "them (match=, --match), or another disk"
        )


def _write(state: dict[str, Any], file: _Counted) -> None:
    try:
        torch.save(state, file)  # type: ignore[arg-type]  # torch uses only write and flush
        file.flush()
    except RuntimeError as error:
        # torch turns the OSError of a full disk into a RuntimeError that only says "unexpected pos".
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
