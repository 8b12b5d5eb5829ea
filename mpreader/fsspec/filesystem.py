"""File system for programs that use fsspec (pandas, pyarrow, zarr, dask, …): reads through the worker pool.

fsspec finds it by itself: ``fsspec.open("mpreader://bucket/key")``. ``fsspec.register_implementation("s3",
RangeFileSystem, clobber=True)`` uses it in place of s3fs; ``"https"`` works, too.

It is responsible for the arguments and results of the methods that read bytes; those that copy, list and describe files
are its base classes'. Bytes are read by :mod:`mpreader.fsspec.slices`. It must not write to a store::

    filesystem (bytes, options) ─► copying (get) ─► names (ls, find, glob, …) ─► description (info, exists, ukey, …)
        ─► asynchronous (_info, _cat_file, …)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, TypeVar, cast

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.fetch.arguments import DEFAULT_FETCH_GAP_SIZE
from mpreader.fsspec.copying import CopyingFileSystem
from mpreader.fsspec.file import AsyncRangeFile, RangeFile
from mpreader.fsspec.listing import version_of
from mpreader.fsspec.options import refuse_options
from mpreader.pool.source import ObjectVersion

__all__ = ["RangeFile", "RangeFileSystem"]

Settings = TypeVar("Settings", PoolConfig, S3ClientConfig)


class RangeFileSystem(CopyingFileSystem):
    """A read-only file system of the objects in S3. Thread-safe; works after a fork and survives pickling.

    A path is ``bucket/key``, with or without ``mpreader://`` or ``s3://`` in front, or an http(s) URL, which is always
    a file. An open file reads the version that existed when it was opened. Instances with equal settings share a pool
    of worker processes, which ends when it is idle. Bytes are always of the present version: only listings are ever
    kept, and only if that is asked for.

    The methods with an underscore, such as ``_cat_file``, are asynchronous.

    Args:
        s3client_config: Settings of the S3 client. None: the defaults and the usual ``AWS_*`` environment.
        pool_config: Settings of the worker pool. None: the defaults.
        region: Replaces ``s3client_config.region``.
        endpoint_url: Replaces ``s3client_config.endpoint_url``.
        profile: Replaces ``s3client_config.profile``.
        anon: Replaces ``s3client_config.unsigned``; this is fsspec's name for that setting.
        asynchronous: True: the caller awaits the asynchronous methods, in an event loop of its own, as zarr does.
        loop: Event loop on which fsspec's own synchronous functions run the asynchronous methods. None: fsspec's.
        batch_size: Most files that one call reads or copies at the same time, and most asynchronous calls that run at
            the same time. None: all that one call reads, 8 copies, 32 calls.
        use_listings_cache: True keeps the listings of folders: what is listed or described is as it was then. False
            does not. None: they are kept if one of the next two is given. ``refresh=True`` and ``invalidate_cache``
            have them asked for again.
        listings_expiry_time: Seconds for which a kept listing is used. None: for ever.
        max_paths: Most folders whose listings are kept. None: no bound.

    ``skip_instance_cache=True``, which fsspec itself takes, makes a new instance.

    Raises:
        ConfigError: A setting is wrong.
        TypeError: An argument is something else. One that s3fs takes: the error says what to use in its place.
    """

    def __init__(
        self,
        s3client_config: S3ClientConfig | Mapping[str, Any] | None = None,
        pool_config: PoolConfig | Mapping[str, Any] | None = None,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        profile: str | None = None,
        anon: bool | None = None,
        asynchronous: bool = False,
        loop: Any = None,
        batch_size: int | None = None,
        use_listings_cache: bool | None = None,
        listings_expiry_time: float | None = None,
        max_paths: int | None = None,
        **unknown: Any,
    ) -> None:
        refuse_options(unknown, [*signature(RangeFileSystem.__init__).parameters][1:-1])  # without self and unknown
        config = _settings("s3client_config", s3client_config, S3ClientConfig) or S3ClientConfig()
        given = {"region": region, "endpoint_url": endpoint_url, "profile": profile, "unsigned": anon}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        super().__init__(
            replace(config, **changes),
            _settings("pool_config", pool_config, PoolConfig),
            asynchronous=asynchronous,
            loop=loop,
            batch_size=batch_size,
            use_listings_cache=use_listings_cache,
            listings_expiry_time=listings_expiry_time,
            max_paths=max_paths,
        )

    # -- bytes

    def cat_ranges(
        self,
        paths: Sequence[str],
        starts: int | Iterable[int | None] | None,
        ends: int | Iterable[int | None] | None,
        max_gap: float | None = None,
        on_error: str = "return",
        *,
        batch_size: int | None = None,
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
            batch_size: Most files that are read at the same time. None: the file system's ``batch_size``.

        Returns:
            ``bytes`` for each range, in the order of the input.

        Raises:
            ValueError: The number of starts or ends is not that of the paths, or ``on_error`` is something else.
            TypeError: ``paths`` is a single path, or a start or an end is not a whole number.
            MpreaderError: As for :class:`mpreader.RangeFetcher`, if ``on_error`` is ``"raise"``.
        """
        if isinstance(paths, (str, os.PathLike)):  # a text is a sequence, too: each letter would pass for a path
            raise TypeError(f"paths is a list of paths, got {paths!r}")
        _check_choice("on_error", on_error, "return", "raise")
        slices = map(slice, _for_each(paths, starts), _for_each(paths, ends))
        # Grouped by file, since a file's version is asked for once; the numbers bring the bytes back into their order.
        wanted: dict[str, dict[int, slice]] = {}
        for index, (path, limits) in enumerate(zip(paths, slices, strict=True)):
            wanted.setdefault(self._strip_protocol(path), {})[index] = limits
        read = self._reader.try_read_current if on_error == "return" else self._reader.read_current
        contents: dict[int, Any] = {}
        for batch in _batches([*wanted], batch_size or self.batch_size):
            read_now = {path: wanted[path] for path in batch}
            contents.update(read(read_now, DEFAULT_FETCH_GAP_SIZE if max_gap is None else max_gap))
        return [contents[index] for index in range(len(paths))]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Read bytes [start, end) of a file, which mean the same as in :meth:`cat_ranges`.

        Raises:
            MpreaderError: As for :class:`mpreader.RangeFetcher`.
        """
        content: bytes = self.cat_ranges([path], start, end, on_error="raise")[0]
        return content

    def cat(
        self,
        path: str | list[str],
        recursive: bool = False,
        on_error: str = "raise",
        *,
        start: int | None = None,
        end: int | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Read files, all at the same time.

        Args:
            path: A path, a path with wildcards, or a list of paths.
            recursive: True: read all files below the paths.
            on_error: ``"raise"``: the first error is raised. ``"omit"``: a file that can't be read is left out.
                ``"return"``: the error is returned in place of the bytes.
            start: First byte to read of each file, as for :meth:`cat_file`.
            end: One past the last byte to read of each file.
            batch_size: As for :meth:`cat_ranges`.

        Returns:
            The bytes of the file if ``path`` names a single one; otherwise a dict of the bytes of each file by path.

        Raises:
            FileNotFoundError: There is no such file.
            MpreaderError: As for :class:`mpreader.RangeFetcher`, if ``on_error`` is ``"raise"``.
        """
        _check_choice("on_error", on_error, "raise", "omit", "return")
        paths = self.expand_path(path)
        if recursive:
            paths = self._files_at(paths)
        if isinstance(path, (str, os.PathLike)) and paths == [self._strip_protocol(path)]:
            return self.cat_file(paths[0], start, end)
        # cat_ranges() has no "omit": it returns the errors, which are left out below.
        on_error_of_ranges = "raise" if on_error == "raise" else "return"
        contents = self.cat_ranges(paths, start, end, on_error=on_error_of_ranges, batch_size=batch_size)
        return {
            name: content
            for name, content in zip(paths, contents, strict=True)
            if on_error != "omit" or not isinstance(content, Exception)
        }

    def _files_at(self, roots: Iterable[str]) -> list[str]:
        """Return the files at or below paths; raises FileNotFoundError where there is nothing."""
        files: set[str] = set()
        for root in roots:
            below = self.find(root)
            if not below:
                self.info(root)  # raises, if it is not an empty folder
            elif below != [root] and self.isfile(root):  # a file that is also a folder
                files.add(root)
            files.update(below)
        return sorted(files)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        *,
        autocommit: bool = True,
        cache_type: str = "readahead",
        cache_options: dict[str, Any] | None = None,
        size: int | None = None,
        etag: str | None = None,
        version: ObjectVersion | None = None,
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
        return RangeFile(
            self,
            path,
            self._reader,
            version,
            details,
            mode=mode,
            block_size=block_size,
            autocommit=autocommit,
            cache_type=cache_type,
            cache_options=cache_options,
        )

    async def open_async(self, path: str, mode: str = "rb") -> AsyncRangeFile:
        """Open a file whose ``read`` is awaited.

        Args:
            path: Path of the file.
            mode: ``"rb"``.

        Raises:
            ValueError: ``mode`` is something else.
            FileNotFoundError: There is no such file.
            MpreaderError: The server refuses, or can't be reached.
        """
        if "b" not in mode:
            raise ValueError(f"mode must be 'rb', got {mode!r}")
        return AsyncRangeFile(await self._run(self.open, path, mode), self._run)

    def close(self) -> None:
        """Close the connections, and stop the workers when their last user is done with them. Idempotent.

        The file system can still be used: it then connects and starts workers again.
        """
        super().close()
        self._reader.close()

    def to_dict(self, *, include_password: bool = True) -> dict[str, Any]:  # noqa: ARG002  # there is none
        """Return the arguments of the file system for ``to_json``; zarr makes asynchronous file systems by it."""
        options = {name: _plain(value) for name, value in self.storage_options.items() if name != "loop"}
        cls = type(self)
        return {
            "cls": f"{cls.__module__}:{cls.__name__}",
            "protocol": self.protocol[0],
            "args": [*map(_plain, self.storage_args)],
            **options,
        }

    def __reduce__(self) -> Any:
        # An event loop is of one process, and can't be pickled.
        make, (cls, args, options) = super().__reduce__()
        return make, (cls, args, {name: value for name, value in options.items() if name != "loop"})


def _check_choice(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _for_each(paths: Sequence[str], limits: int | Iterable[int | None] | None) -> list[int | None]:
    """Return a limit for each path, from a list of limits or from one for all paths."""
    each = [*limits] if isinstance(limits, Iterable) else [limits] * len(paths)
    if len(each) != len(paths):
        raise ValueError(f"{len(paths)} paths need as many starts and ends, got {len(each)}")
    return each


def _batches(paths: Sequence[str], size: int | None) -> Iterator[Sequence[str]]:
    """Yield the paths, so many at a time; None, or fsspec's -1: all at once."""
    size = size if size is not None and size > 0 else max(1, len(paths))
    return (paths[start : start + size] for start in range(0, len(paths), size))


def _settings(name: str, value: Any, kind: type[Settings]) -> Settings | None:
    """Return settings that are given as an object, or as the dict that :func:`_plain` has made of one."""
    if isinstance(value, Mapping) and value.get("type") == kind.__name__:
        return kind(**{field: setting for field, setting in value.items() if field != "type"})
    check_type(name, value, kind)
    return cast("Settings | None", value)


def _plain(value: Any) -> Any:
    """Return settings as a dict, which JSON can have, of their type and what is not the default; others as they are."""
    if not isinstance(value, (PoolConfig, S3ClientConfig)):
        return value
    names = [field.name for field in fields(value)]
    default = type(value)()
    changed = {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}
    return {"type": type(value).__name__, **changed}
