"""File system for programs that use fsspec (pandas, pyarrow, zarr, dask, …): reads through the worker pool.

fsspec finds it by itself: ``fsspec.open("mpreader://bucket/key")``. ``fsspec.register_implementation("s3",
RangeFileSystem, clobber=True)`` uses it in place of s3fs; ``"https"`` works, too.

It is responsible for the arguments and results of fsspec's methods. Bytes are read by :mod:`mpreader.fsspec.slices`,
buckets are listed by :mod:`mpreader.fsspec.listing`. It must not write to a store.
"""

from __future__ import annotations

import datetime
import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NoReturn

from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike, stringify_path, tokenize

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.fetch.arguments import DEFAULT_FETCH_GAP_SIZE
from mpreader.fsspec.file import RangeFile
from mpreader.fsspec.listing import FileInfo, Info, describe, list_below, list_folder, version_of
from mpreader.fsspec.slices import SliceReader, is_url
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.version import is_strong

__all__ = ["RangeFile", "RangeFileSystem"]


class RangeFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only file system of the objects in S3. Thread-safe; works after a fork and survives pickling.

    A path is ``bucket/key``, with or without ``mpreader://`` or ``s3://`` in front, or an http(s) URL, which is always
    a file. Listings and sizes are not cached. An open file reads the version that existed when it was opened. Instances
    with equal settings share a pool of worker processes, which ends when it is idle.

    Args:
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        region: Replaces ``s3client_config.region``.
        endpoint_url: Replaces ``s3client_config.endpoint_url``.
        profile: Replaces ``s3client_config.profile``.
        anon: Replaces ``s3client_config.unsigned``; this is fsspec's name for that setting.

    Raises:
        ConfigError: A setting is wrong.
        TypeError: An argument is something else.
    """

    protocol = ("mpreader", "s3", "s3a")

    def __init__(
        self,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        profile: str | None = None,
        anon: bool | None = None,
    ) -> None:
        super().__init__()
        check_type("s3client_config", s3client_config, S3ClientConfig)
        check_type("pool_config", pool_config, PoolConfig)
        given = {"region": region, "endpoint_url": endpoint_url, "profile": profile, "unsigned": anon}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self._reader = SliceReader(replace(s3client_config or S3ClientConfig(), **changes), pool_config)

    # -- bytes

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: int | Iterable[int | None] | None,
        ends: int | Iterable[int | None] | None,
        max_gap: float | None = None,
        on_error: str = "return",
        **_ignored: object,
    ) -> list[Any]:
        """Read ranges of files, all at the same time.

        Args:
            paths: The file of each range.
            starts: First byte of each range, or one number for all ranges. A negative number counts from the end of the
                file. None: 0.
            ends: One past the last byte of each range, or one number for all ranges. A negative number counts from the
                end of the file. None: the end of the file. As in a slice of Python, bytes past the end are left out.
            max_gap: Largest gap, in bytes, between two ranges that are read as one. None: 1 MiB.
            on_error: ``"return"``: the list holds an error in place of bytes that could not be read. ``"raise"``: the
                first error is raised.

        Returns:
            ``bytes`` for each range, in the order of the input.

        Raises:
            ValueError: The number of starts or ends is not that of the paths.
            TypeError: ``paths`` is a single path, or a start or an end is not a whole number.
            MpreaderError: As for :class:`mpreader.RangeFetcher`, if ``on_error`` is ``"raise"``.
        """
        if isinstance(paths, (str, os.PathLike)):  # a text is a sequence, too: each letter would pass for a path
            raise TypeError(f"paths is a list of paths, got {paths!r}")
        slices = map(slice, _for_each(paths, starts), _for_each(paths, ends))
        # Grouped by file, since a file's version is asked for once; the numbers bring the bytes back into their order.
        wanted: dict[str, dict[int, slice]] = {}
        for index, (path, limits) in enumerate(zip(paths, slices, strict=True)):
            wanted.setdefault(self._strip_protocol(path), {})[index] = limits
        read = self._reader.try_read_current if on_error == "return" else self._reader.read_current
        contents = read(wanted, DEFAULT_FETCH_GAP_SIZE if max_gap is None else max_gap)
        return [contents[index] for index in range(len(paths))]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_ignored: object) -> bytes:
        """Read bytes [start, end) of a file, which mean the same as in :meth:`cat_ranges`.

        Raises:
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
        """
        content: bytes = self.cat_ranges([path], start, end, on_error="raise")[0]
        return content

    def cat(self, path: str | list[str], recursive: bool = False, on_error: str = "raise", **limits: Any) -> Any:
        """Read files, all at the same time.

        Args:
            path: A path, a path with wildcards, or a list of paths.
            recursive: True: read all files below the paths.
            on_error: ``"raise"``: the first error is raised. ``"omit"``: a file that can't be read is left out.
                ``"return"``: the error is returned in place of the bytes.
            limits: ``start`` and ``end`` of the bytes to read of each file, as for :meth:`cat_file`.

        Returns:
            The bytes of the file if ``path`` names a single one; otherwise a dict of the bytes of each file by path.

        Raises:
            FileNotFoundError: There is no such file.
            MpreaderError: As for :class:`mpreader.RangeFetcher`, if ``on_error`` is ``"raise"``.
        """
        paths = self.expand_path(path)
        if recursive:
            paths = sorted({name for root in paths for name in self.find(root)})
        if isinstance(path, str) and paths == [self._strip_protocol(path)]:
            return self.cat_file(path, **limits)
        # cat_ranges() has no "omit": it returns the errors, which are left out below.
        on_error_of_ranges = "raise" if on_error == "raise" else "return"
        contents = self.cat_ranges(paths, limits.get("start"), limits.get("end"), on_error=on_error_of_ranges)
        return {
            name: content
            for name, content in zip(paths, contents, strict=True)
            if on_error != "omit" or not isinstance(content, Exception)
        }

    def get_file(
        self, rpath: str, lpath: Any = None, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **_ignored: object
    ) -> None:
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
        # fsspec accepts an open file as either argument.
        outfile = lpath if outfile is None and isfilelike(lpath) else outfile
        info = self.info(rpath)
        if outfile is None and info["type"] == "directory":
            os.makedirs(lpath, exist_ok=True)
            return
        path, size = info["name"], info["size"]
        file = self._reader.at_version(path, version_of(info))
        with ExitStack() as stack:
            if outfile is None:
                os.makedirs(os.path.dirname(os.path.abspath(lpath)), exist_ok=True)
                outfile = stack.enter_context(open(lpath, "wb"))
            callback.set_size(size)
            # Streamed in ranges of one request each, because a range is held in memory until all of it has arrived.
            fetcher = stack.enter_context(self._reader.fetcher({path: file}))
            parts = [(at, min(at + fetcher.part_size, size)) for at in range(0, size, fetcher.part_size)]
            for _, view in stack.enter_context(fetcher.stream(path, parts)):
                outfile.write(view)
                callback.relative_update(len(view))
                del view  # it would otherwise keep its slot while the next one is waited for

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        *,
        size: int | None = None,
        etag: str | None = None,
        version: ObjectVersion | None = None,
        **options: Any,
    ) -> RangeFile:
        # fsspec calls it for open(), and with a version when a file is unpickled: then that version is opened, without
        # a request. A size and an ETag name a version, too.
        if set(mode) & set("wax+"):
            self._refuse(path)
        if mode != "rb":
            raise ValueError(f"mode must be 'rb' or 'r', got {mode!r}")
        details = None
        if version is None and size is not None and etag is not None:
            version = ObjectVersion(size, etag)
        elif version is None:
            details = self._file_info(path)
            version = version_of(details) if etag is None else ObjectVersion(details["size"], etag)
        return RangeFile(self, path, self._reader, version, details, mode=mode, block_size=block_size, **options)

    # -- names

    def info(self, path: str, **_ignored: object) -> Info:
        """Describe a file or folder.

        Returns:
            ``name``, ``type`` (``"file"`` or ``"directory"``) and ``size`` in bytes; for a file also ``ETag`` and
            ``LastModified``, in UTC, which is None if the service does not say.

        Raises:
            FileNotFoundError: There is no such file or folder.
            MpreaderError: The server refuses, or can't be reached.
        """
        path = self._strip_protocol(path)
        if not is_url(path):
            return describe(self._reader.client(), path)
        version = self._reader.current(path).version
        facts = {"name": path, "size": version.size, "type": "file", "ETag": version.etag, "LastModified": None}
        return FileInfo(version, facts)

    def exists(self, path: str, **_ignored: object) -> bool:
        """Return True if there is such a file or folder.

        Raises:
            MpreaderError: The server refuses to answer, or can't be reached. Then it is not known if there is one.
        """
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def ls(self, path: str, detail: bool = True, **_ignored: object) -> list[Any]:
        """List the files and folders in a folder. For the path of a file, list that file.

        Args:
            path: The folder, or a bucket.
            detail: True: return descriptions, as :meth:`info` does. False: return names.

        Raises:
            FileNotFoundError: There is no such file or folder.
            ConfigError: ``path`` names no bucket.
            MpreaderError: The server refuses, or can't be reached.
        """
        path = self._strip_protocol(path)
        infos = [self.info(path)] if is_url(path) else list_folder(self._reader.client(), path)
        return infos if detail else [info["name"] for info in infos]

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        """List the files below a folder, at any depth. For the path of a file, list that file.

        Args:
            path: The folder, or a bucket.
            maxdepth: Number of levels of folders to list. None: all levels, which takes the fewest requests.
            withdirs: True: list folders, too.
            detail: True: return a dict of descriptions by name, as :meth:`info` gives them. False: return a list of
                names.
            options: Further arguments of fsspec's ``find``.

        Raises:
            ConfigError: ``path`` names no bucket.
            MpreaderError: The server refuses, or can't be reached.
        """
        path = self._strip_protocol(path)
        if maxdepth is not None and not is_url(path):
            # fsspec goes down folder by folder, with a request for each. S3 can't limit the depth of a listing.
            return super().find(path, maxdepth, withdirs, detail, **options)
        try:
            found = [] if is_url(path) else [*list_below(self._reader.client(), path)]
            if not found and "/" in path:  # perhaps the path of a file; a path without a slash is a bucket
                found = [self.info(path)]
        except FileNotFoundError:
            found = []  # fsspec's find() lists nothing for a path that does not exist, and does not raise
        infos = {info["name"]: info for info in found if withdirs or info["type"] == "file"}
        return {name: infos[name] for name in sorted(infos)} if detail else sorted(infos)

    def glob(self, path: str, maxdepth: int | None = None, **options: Any) -> Any:
        """Find files by a pattern, as fsspec does. An http(s) URL is never a pattern, as it may contain a ``?``.

        Raises:
            MpreaderError: As for :meth:`find`.
        """
        url = self._strip_protocol(path)
        return self.find(url, **options) if is_url(url) else super().glob(path, maxdepth, **options)

    def checksum(self, path: str) -> int:
        """Return the version token of :meth:`ukey` as a number."""
        return int(self.ukey(path), 16)

    def ukey(self, path: str) -> str:
        """Return a version token of a file as text: it differs whenever the file was overwritten by another content.

        Where the server gives no strong ETag, it differs with everything that the server says of the version.
        """
        version = version_of(self._file_info(path))
        return str(tokenize(version.etag if is_strong(version.etag) else (version.size, version.validators)))

    def modified(self, path: str) -> datetime.datetime:
        """Return the time at which a file was written, in UTC.

        Raises:
            OSError: It is a folder, or the service does not tell the time.
        """
        moment: datetime.datetime | None = self._file_info(path)["LastModified"]
        if moment is None:
            raise OSError(errno.ENODATA, "the service does not say when it was written", path)
        return moment

    created = modified  # S3 replaces objects as a whole, so that a version is created when it is written

    def close(self) -> None:
        """Close the connections, and stop the workers when their last user is done with them. Idempotent.

        The file system can still be used: it then connects and starts workers again.
        """
        self._reader.close()

    # -- methods that write, all of which are refused

    def _refuse(self, path: Any = None, *_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "mpreader's file system only reads", str(path))

    mkdir = makedirs = rmdir = rm = rm_file = _rm = touch = _refuse
    copy = cp_file = mv = put = put_file = pipe = pipe_file = _refuse

    # -- paths

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        # fsspec calls it for every path. It removes mpreader:// and s3://; an http(s) URL remains as it is, also behind
        # mpreader://.
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]
        path = stringify_path(path)
        url: str = path.removeprefix(f"{cls.protocol[0]}://")
        return url if is_url(url) else super()._strip_protocol(path).lstrip("/")

    def _file_info(self, path: str) -> Info:
        """Describe a file; raises IsADirectoryError for a folder."""
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return info


def _for_each(paths: Sequence[str], limits: int | Iterable[int | None] | None) -> list[int | None]:
    """Return a limit for each path, from a list of limits or from one for all paths."""
    each = [*limits] if isinstance(limits, Iterable) else [limits] * len(paths)
    if len(each) != len(paths):
        raise ValueError(f"{len(paths)} paths need as many starts and ends, got {len(each)}")
    return each
