"""Copies of files to local ones, the methods ``get`` and ``get_file`` of the file system.

It is the part of the file system between :mod:`mpreader.fsspec.names` and :mod:`mpreader.fsspec.filesystem`. Which file
goes where is decided by :mod:`mpreader.fsspec.copy_plan`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from typing import Any, BinaryIO, Final

from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.utils import isfilelike, stringify_path

from mpreader.errors import PoolClosed
from mpreader.fsspec.copy_plan import Copy, local_paths, plan_copies
from mpreader.fsspec.listing import version_of
from mpreader.fsspec.names import NamedFileSystem

__all__ = ["CopyingFileSystem"]

_FILES_AT_ONCE: Final = 8  # copied by get(), where batch_size does not say otherwise: small files wait for their HEADs


class CopyingFileSystem(NamedFileSystem):
    """The methods of the file system that copy files to local ones."""

    def get(
        self,
        rpath: Any,
        lpath: Any,
        recursive: bool = False,
        callback: Any = DEFAULT_CALLBACK,
        maxdepth: int | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        """Copy files to local ones, several at the same time.

        Args:
            rpath: A path, a path with wildcards, or a list of paths.
            lpath: Local path, or a list with one for each. A folder, or a path that ends in a slash: copies go into it.
            recursive: True: copy all that is below folders.
            callback: Callback of fsspec, which is told of the progress in files.
            maxdepth: Number of levels of folders to copy. None: all.
            batch_size: Most files that are copied at the same time. None: the file system's ``batch_size``.

        Raises:
            FileNotFoundError: There is nothing to copy.
            FileExistsError: A file that has bytes can't be copied because its local path is taken, by a folder of the
                same name or by another file. All others were copied.
            PlanError: A local path would lie outside of ``lpath``.
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
            OSError: A local file can't be written.
        """
        copies = [*dict.fromkeys(self._copies(rpath, lpath, recursive=recursive, maxdepth=maxdepth))]
        callback.set_size(len(copies))
        files, others = plan_copies(copies)
        self._get_all(files, callback, batch_size or self.batch_size or _FILES_AT_ONCE)
        # What is not copied must be a folder, or an empty object that marks one for some programs: nothing is lost.
        lost = [copy for copy in others if self.info(copy.remote, refresh=True)["size"]]
        callback.relative_update(len(others))
        if lost:
            raise FileExistsError(
                errno.EEXIST,
                f"its local path, {lost[0].local}, is that of a folder or of another file, and everything else was "
                f"copied ({len(lost)} such files): copy it to another place by itself, with get_file()",
                lost[0].remote,
            )

    def get_file(self, rpath: str, lpath: Any = None, callback: Any = DEFAULT_CALLBACK, outfile: Any = None) -> None:
        """Copy a file to a local file, in bounded memory. For a folder, make an empty local folder.

        Args:
            rpath: Path of the file.
            lpath: Path of the local file, or an open file. Folders are made as needed.
            callback: Callback of fsspec, which is told of the progress in bytes.
            outfile: An open file, in place of ``lpath``.

        Raises:
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
            OSError: The local file can't be written.
        """
        self._get_one(rpath, lpath, callback, outfile, _Streams())

    def _copies(self, rpath: Any, lpath: Any, *, recursive: bool, maxdepth: int | None) -> list[Copy]:
        """Return what :meth:`get` is to copy, folders included."""
        remote = [*map(stringify_path, rpath)] if isinstance(rpath, (list, tuple)) else stringify_path(rpath)
        local = [*map(stringify_path, lpath)] if isinstance(lpath, (list, tuple)) else stringify_path(lpath)
        if isinstance(remote, list) and isinstance(local, list):
            paths = [self._strip_protocol(path) for path in remote]
        else:
            paths = self.expand_path(remote, recursive, maxdepth)
            # As fsspec does: what a pattern or a bound of the depth leaves of a folder is not made as a folder.
            if isinstance(remote, str) and (not recursive or maxdepth is not None):
                paths = [path for path in paths if not self.isdir(path)]
                if not paths:
                    return []
        return [*map(Copy, paths, local_paths(remote, paths, local))]

    def _get_all(self, files: Sequence[Copy], callback: Any, at_once: int) -> None:
        """Copy files, so many at the same time (-1: all); the first error ends all copies."""
        streams = _Streams()
        threads = ThreadPoolExecutor(at_once if at_once > 0 else max(1, len(files)), "mpreader-get")
        try:
            copying = [threads.submit(self._get_branch, copy, callback.branched(*copy), streams) for copy in files]
            for done in as_completed(copying):
                done.result()
                callback.relative_update(1)
        except BaseException as error:
            threads.shutdown(wait=False, cancel_futures=True)
            streams.close()
            # After an error no file changes any more. A Ctrl-C does not wait for a HEAD that is under way.
            threads.shutdown(wait=isinstance(error, Exception))
            raise
        threads.shutdown()

    def _get_branch(self, copy: Copy, callback: Any, streams: _Streams) -> None:
        with callback:
            self._get_one(copy.remote, copy.local, callback, None, streams)

    def _get_one(self, rpath: str, lpath: Any, callback: Any, outfile: Any, streams: _Streams) -> None:
        # fsspec accepts an open file as either argument.
        outfile = lpath if outfile is None and isfilelike(lpath) else outfile
        info = self.info(rpath, refresh=True)
        if outfile is None and info["type"] == "directory":
            os.makedirs(lpath, exist_ok=True)
            return
        path, size = info["name"], info["size"]
        file = self._reader.at_version(path, version_of(info))
        with ExitStack() as stack:
            if outfile is None:
                outfile = stack.enter_context(_local_file(lpath))
            callback.set_size(size)
            # Streamed in ranges of one request each, because a range is held in memory until all of it has arrived.
            fetcher = stack.enter_context(self._reader.fetcher({path: file}))
            parts = [(at, min(at + fetcher.part_size, size)) for at in range(0, size, fetcher.part_size)]
            stream = stack.enter_context(fetcher.stream(path, parts))
            streams.add(stream)
            written = 0
            for _, view in stream:
                outfile.write(view)
                written += len(view)
                callback.relative_update(len(view))
                del view  # it would otherwise keep its slot while the next one is waited for
            if written != size:  # a stream that was closed ends without an error
                raise PoolClosed(f"the copy of {path} was ended, as another one has failed")


class _Streams:
    """Streams of copies under way, which another thread may end. Thread-safe."""

    def __init__(self) -> None:
        self._streams: list[Any] = []
        self._closed = False

    def add(self, stream: Any) -> None:
        """Add a stream; it is closed at once if the others are."""
        self._streams.append(stream)
        if self._closed:  # looked at after the append, so that close() misses none
            stream.close()

    def close(self) -> None:
        """Close all streams: whoever waits for one of them gets an error."""
        self._closed = True
        for stream in [*self._streams]:
            stream.close()


@contextlib.contextmanager
def _local_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a local file for writing; it is removed if the block raises, since it would be a part of a file only."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "wb") as file:
        try:
            yield file
        except BaseException:
            if os.path.isfile(path):  # and not a device
                os.unlink(path)
            raise
