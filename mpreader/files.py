"""Local files that appear only when they are complete: written under a temporary name, renamed at the end.

Used by the converter, timelines and downloads for the files that they write. It must not import anything of mpreader,
and does not know what is in a file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from io import FileIO
from typing import BinaryIO

__all__ = ["errors_naming", "rename_whole", "whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that replaces ``path`` when the block ends.

    Until then ``path`` is unchanged. If the block raises, the new file is removed, and ``path`` remains unchanged.

    Yields:
        The new file, empty and open for writing. It is closed when the block ends.

    Raises:
        OSError: The file can't be created, written to the disk or renamed; the error names ``path``.
    """
    # In the same folder, since a rename is only possible within a file system.
    temporary = os.path.join(os.path.dirname(path), f".mpreader-{secrets.token_hex(8)}.part")
    with errors_naming(path):
        # Not in a with block (SIM115): an error in closing is handled differently from the others, see below.
        file = open(temporary, "xb")  # noqa: SIM115
    try:
        yield file
        with errors_naming(path):
            file.flush()
            rename_whole(file, temporary, path)
    finally:
        # close() writes what is buffered. On a full disk it would fail, and its error would hide the one that is being
        # raised. After success nothing is buffered.
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):  # after the rename there is no such file
            os.unlink(temporary)


def rename_whole(file: BinaryIO | FileIO, temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Write an open file to the disk, then rename it, so that not even a crash of the host leaves a partial file.

    Args:
        file: The file; it must have been flushed.
        temporary: Its present name.
        path: Its new name; a file of this name is replaced.

    Raises:
        OSError: One of the steps failed.
    """
    # Content before name: after a crash in between, the new name must not lead to a file without its content.
    os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name is stored in the folder, which needs its own fsync
    finally:
        os.close(folder)


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Replace each ``OSError`` of the block by one that names ``path``.

    The errors of an open file name no file, those of a rename name the temporary one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
