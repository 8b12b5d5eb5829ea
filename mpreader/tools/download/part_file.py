"""Part file: a download that grows as ``FILE.part`` until it is whole, and that another call can go on with.

Other files are written by :func:`mpreader.files.whole_file`, which removes what is not whole. A part file is different
on purpose: it has a name that the next call finds, it outlives errors and crashes, and it is locked against a second
writer. The last step, bringing it to the disk and renaming it, is the same.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from mpreader.config import MiB
from mpreader.errors import ConfigError
from mpreader.files import errors_naming, rename_whole
from mpreader.pool.worker.version import Validators, find_change, find_difference, merged

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PartFile", "write_all"]

_READ_BYTES: Final = 1 * MiB
# Some network file systems have no locks. A download there goes on without one, unprotected against a second writer.
_HAS_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})

_log = logging.getLogger(__name__)


class PartFile:
    """``FILE.part``, locked, with the bytes that an earlier call for the same download left in it. A context manager.

    ``FILE.part.json`` beside it holds the identity of the download. Both stay when the block ends in an error, so that
    another call can go on, unless nothing was written. :meth:`finish` renames the part, :meth:`discard` removes it, and
    both remove the identity.

    Args:
        path: FILE; of a symbolic link the file that it leads to.
        identity: Facts that must be the same for a call to go on: ``source``, ``etag``, ``validators``, ``size`` and
            ``ranges``.
        resume: Keep the bytes that are there, if they are of this download. False: drop them.

    Attributes:
        started_over: Reason, in words, for which the bytes that were there were dropped; None if none were.
        validators: Validators of the version that the bytes are of, which an earlier call may have learned.

    Raises:
        OSError: It can't be written, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any], *, resume: bool = True) -> None:
        self._final, self._path, self._state = _paths(path)
        self.started_over: str | None = None
        self._identity = identity
        self.validators = _validators_in(identity)
        # Opened without truncating: it may hold the bytes of an earlier call, or belong to another process.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._file = open(os.open(self._path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115  # closed by __exit__
        try:
            self._lock()  # before the size is read, which another writer could still change
            left = os.fstat(self._file.fileno()).st_size
            self.started_over = self._why_useless(left, identity) if resume and left else None
            if not resume or not left or self.started_over is not None:
                # Truncated before the identity is written: after a crash between the two, an empty part is of another
                # download, which is harmless; old bytes beside a new identity would be taken for the new object's.
                self._file.truncate(0)
                self.note(self.validators)
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def check(path: str | os.PathLike[str]) -> None:
        """Check, before anything is fetched, that ``path`` can be written.

        Raises:
            ConfigError: ``path`` is a folder or a device, or lies in no folder.
        """
        final, _, _ = _paths(path)
        if final.is_dir():
            raise ConfigError(f"{os.fspath(path)!r} is a folder; name a file in it")
        if final.exists() and not final.is_file():
            raise ConfigError(f"{os.fspath(path)!r} is a device or a pipe, not a file")
        if not final.parent.is_dir():
            raise ConfigError(f"{os.fspath(path)!r} can't be written: there is no folder {str(final.parent)!r}")

    @staticmethod
    def try_size(path: str | os.PathLike[str]) -> int | None:
        """Bytes that an earlier call has left; None if there is no part."""
        try:
            return _paths(path)[1].stat().st_size
        except OSError:
            return None

    def note(self, validators: Validators) -> None:
        """Write the identity of the download, with these validators of the version."""
        self.validators = validators
        by_name = dict(validators)
        identity = {"etag": by_name.pop("etag", ""), "validators": [list(each) for each in by_name.items()]}
        self._state.write_text(json.dumps({**self._identity, **identity}, indent=2) + "\n")

    def take_kept(self, use: Callable[[bytes], object]) -> int:
        """Hand the bytes that are there already to ``use``, piece by piece; returns how many they are."""
        kept = 0
        while chunk := self._file.read(_READ_BYTES):
            use(chunk)  # the checksum is that of the whole file, and so of these bytes, too
            kept += len(chunk)
        if kept:
            _log.info("%s has %d bytes already", self._path, kept)
        return kept

    def write(self, data: memoryview) -> None:
        """Append these bytes."""
        with errors_naming(self._path):
            write_all(self._file, data)

    def finish(self) -> None:
        """Bring the file to the disk, and give it its final name.

        Raises:
            OSError: One of the two failed; the part is still there.
        """
        with errors_naming(self._path):
            rename_whole(self._file, self._path, self._final)
        self._state.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the part and its identity."""
        self._path.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:  # closes it, and with it the lock
            # An empty part would only litter the folder. After finish() the open file has its final name, and one
            # that is called FILE.part now would be another process's.
            if not os.fstat(self._file.fileno()).st_size and self._is_there():
                self.discard()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between our open() and the lock, its former owner may have renamed it: then it is the finished file,
            # which must not be written to.
            is_ours = self._is_there()
        except OSError as error:
            is_ours = error.errno in _HAS_NO_LOCKS
            if not is_ours and not isinstance(error, BlockingIOError):
                raise
        if not is_ours:
            raise OSError(f"another process is writing {self._path}; wait for it, or choose another file")

    def _is_there(self) -> bool:
        """True if the open file is still the one of this name."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _why_useless(self, left: int, identity: dict[str, Any]) -> str | None:
        """Reason, in words, for which a download of this identity can't go on from the bytes that are there."""
        try:
            state = json.loads(self._state.read_text())
        except (OSError, ValueError):
            return f"{self._state} is missing or damaged"
        if not isinstance(state, dict) or state.get("source") != identity["source"]:
            return f"{self._path} is of another object"
        known, now = _validators_in(state), self.validators
        if state.get("size") != identity["size"] or find_change(known, now) is not None:
            return "the object was overwritten since"
        if state.get("ranges") != identity["ranges"]:
            return f"{self._path} is of other ranges"
        whole = sum(end - start for start, end in identity["ranges"])
        if left > whole:
            return f"{self._path} is larger than it should be"
        # A server may tell more with its bytes than with a HEAD. Then the first answer shows whether the object is
        # still the same; if nothing is left to be fetched, there is none.
        if not known or (left == whole and find_difference(known, now) is not None):
            return "the server gives no ETag or the like, so nobody knows whether the object is still the same"
        self.validators = merged(known, now)
        return None


def write_all(file: BinaryIO | FileIO, data: memoryview) -> None:
    """Write all of ``data``, even to a file without a buffer, which may take less at one time.

    Raises:
        OSError: It can't be written; BlockingIOError if the file is full and does not wait.
    """
    while data:
        written = file.write(data)
        if written is None:
            raise BlockingIOError(errno.EAGAIN, "it would have to be waited for")
        data = data[written:]


def _validators_in(state: Mapping[str, Any]) -> Validators:
    """Validators in the identity of a download; none where it is damaged, or written by something else."""
    etag, others = state.get("etag"), state.get("validators")
    pairs = [("etag", etag), *(others if isinstance(others, list) else ())]
    found = [(each[0], each[1]) for each in pairs if isinstance(each, (list, tuple)) and len(each) == 2]
    return tuple(
        sorted((name, value) for name, value in found if isinstance(name, str) and isinstance(value, str) and value)
    )


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """Paths of the file, of its part, and of the identity of the part."""
    # A rename would replace a symbolic link itself. The file that it leads to is replaced, as if it were written to.
    final = Path(os.path.realpath(path))
    return final, Path(f"{final}.part"), Path(f"{final}.part.json")
