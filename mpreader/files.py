"""Local files that appear only when they are whole: written under a temporary name, renamed at the end.

The converter, timelines and downloads write their files with it. It knows nothing of what is in a file, and imports
nothing of mpreader.
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
    """Open a new file, beside ``path``, that takes the place of ``path`` when the block ends.

    Until then ``path`` stays as it is. Where the block raises, the new file is removed, and ``path`` stays for good.

    Yields:
        The new file, empty and open for writing. It is closed when the block ends.

    Raises:
        OSError: The file can't be made, brought to the disk or renamed; the error names ``path``.
    """
    # In the same folder, since a rename does not lead across file systems.
    temporary = os.path.join(os.path.dirname(path), f".mpreader-{secrets.token_hex(8)}.part")
    with errors_naming(path):
        file = open(temporary, "xb")  # noqa: SIM115  # closed below, where its errors are told apart
    try:
        yield file
        with errors_naming(path):
            file.flush()
            rename_whole(file, temporary, path)
    finally:
        # Closing flushes: on a full disk it would hide the error that is under way. After a rename nothing is left.
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def rename_whole(file: BinaryIO | FileIO, temporary: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Bring an open file to the disk, then give it its name, so that not even a crash leaves half of it there.

    Args:
        file: Has nothing in its buffer.
        temporary: Its present name.
        path: The name that it gets; a file of this name is replaced.

    Raises:
        OSError: One of the steps failed.
    """
    os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(os.path.dirname(path) or os.curdir, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name is in the folder, which is brought to the disk on its own
    finally:
        os.close(folder)


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let each ``OSError`` of the block name ``path``: those of an open file name none, others a temporary file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
