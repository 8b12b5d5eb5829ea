"""Converter of a checkpoint on S3 to one local file for ``torch.load``.

The file is written under another name in the same folder, and renamed when all of it is on the disk. It is made before
anything is loaded, so that a folder that can't be written to is an error before the load, not after it.
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

    The file is there once all of it is on the disk, never half of it. All of the state must fit in memory.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        path: Path of the file.
        weights_only: True refuses items that are no tensors and not of plain types; torch's function, which has no
            such choice, unpickles whatever there is, as False does.
        overwrite: True replaces a file that is there when this is called, in the end, as torch's function does.
        progress: True shows two progress bars, one for the load and one for the file. None, False: as for
            :func:`load_checkpoint`.

    All other arguments are those of :func:`load_checkpoint`.

    Raises:
        ConfigError: There is no such folder, ``path`` is not that of a file, or is there and is not to be replaced.
        PlanError: The disk, or the memory, has less room than it takes.
        OSError: The file can't be written.
        MpreaderError: As for :func:`load_checkpoint`. Of all of these nothing is left behind.
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
    """File for ``torch.save`` that moves a progress bar with what is written to it."""

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
    """Returns the path of the file to be made, links followed, if it can be made there.

    Raises:
        ConfigError: It can't, or is there and is not to be replaced.
    """
    # A link stays, and the file behind it is replaced, as if the link had been opened and written to.
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
    status = os.fstatvfs(file.fileno())
    needed, free = state_bytes(state), status.f_bavail * status.f_frsize
    if needed > free:
        raise PlanError(
            f"{target}: the tensors take {needed} bytes, but only {free} bytes are free on its disk; select some of "
            "them (match=, --match), or another disk"
        )


def _write(state: dict[str, Any], file: _Counted) -> None:
    try:
        torch.save(state, file)  # type: ignore[arg-type]  # all that it needs of a file
        file.flush()
    except RuntimeError as error:
        # Of a full disk torch says no more than "unexpected pos".
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
