"""Names of the file system: what there is under a path, from HEAD requests, listings, and a cache of listings.

Objects of S3 have keys, not folders. A key may therefore also be the name of a folder: with ``d/x`` and ``d/x/0``,
``d/x`` is a file and has a file below it. Such a name is one thing here: a file, in every description; it is listed
once, and what lies below it is found, too.

It is the part of the file system below :mod:`mpreader.fsspec.filesystem`, which adds the bytes. Buckets are listed, and
listings kept, by :mod:`mpreader.fsspec.listings`.
"""

from __future__ import annotations

import datetime
import errno
import os
from collections.abc import Callable, Iterator
from typing import Any

from fsspec.dircache import DirCache
from fsspec.utils import stringify_path, tokenize

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.errors import ConfigError, ObjectMissing
from mpreader.fsspec.asynchronous import ThreadedFileSystem
from mpreader.fsspec.listing import FileInfo, Info, describe, version_of
from mpreader.fsspec.listings import Listings, by_name
from mpreader.fsspec.slices import SliceReader, is_url
from mpreader.pool.worker.version import is_strong

__all__ = ["NamedFileSystem"]


class NamedFileSystem(ThreadedFileSystem):
    """The methods of the file system that list and describe, without those that read bytes.

    Args:
        s3client_config: Settings of the S3 client.
        pool_config: Settings of the worker pool. None: the defaults.
        use_listings_cache: True keeps listings, False does not. None: they are kept if one of the next two is given.
        listings_expiry_time: Seconds for which a kept listing is used. None: until ``invalidate_cache``.
        max_paths: Most folders whose listings are kept. None: no bound.
        options: Options of :class:`ThreadedFileSystem`.
    """

    protocol: Any = ("mpreader", "s3", "s3a")

    def __init__(
        self,
        s3client_config: S3ClientConfig,
        pool_config: PoolConfig | None,
        *,
        use_listings_cache: bool | None,
        listings_expiry_time: float | None,
        max_paths: int | None,
        **options: Any,
    ) -> None:
        check_type("use_listings_cache", use_listings_cache, bool)
        if listings_expiry_time is not None and not _is_duration(listings_expiry_time):
            raise ConfigError(f"listings_expiry_time must be a number of seconds, got {listings_expiry_time!r}")
        if max_paths is not None and (type(max_paths) is not int or max_paths < 1):
            raise ConfigError(f"max_paths must be a whole number of at least 1, got {max_paths!r}")
        if use_listings_cache is None:
            use_listings_cache = listings_expiry_time is not None or max_paths is not None
        cache: dict[str, Any] = {
            "use_listings_cache": use_listings_cache,
            "listings_expiry_time": listings_expiry_time,
            "max_paths": max_paths,
        }
        super().__init__(**cache, **options)
        self._reader = SliceReader(s3client_config, pool_config)
        # fsspec has made dircache, for the listings of single folders.
        self._listings = Listings(self._reader, self.dircache, DirCache(**cache))

    def info(self, path: str, *, refresh: bool = False) -> Info:
        """Describe a file or folder.

        Args:
            path: Path of it.
            refresh: True: ask the service, also if a kept listing has the answer.

        Returns:
            ``name``, ``type`` (``"file"`` or ``"directory"``) and ``size`` in bytes; for a file also ``ETag`` and
            ``LastModified``, in UTC, which is None if the service does not say.

        Raises:
            FileNotFoundError: There is no such file or folder.
            MpreaderError: The server refuses, or can't be reached.
        """
        path = self._strip_protocol(path)
        if is_url(path):
            version = self._reader.current(path).version
            facts = {"name": path, "size": version.size, "type": "file", "ETag": version.etag, "LastModified": None}
            return FileInfo(version, facts)
        kept = None if refresh else self._listings.kept_info(path)
        return describe(self._reader.client(), path) if kept is None else kept

    def exists(self, path: str, *, refresh: bool = False) -> bool:
        """Return True if there is such a file or folder.

        Raises:
            MpreaderError: The server refuses to answer, or can't be reached. Then it is not known if there is one.
        """
        return self._type_of(path, refresh=refresh) is not None

    lexists = exists  # there are no links

    def isfile(self, path: str) -> bool:
        """Return True if there is such a file; raises as :meth:`exists` does."""
        return self._type_of(path) == "file"

    def isdir(self, path: str) -> bool:
        """Return True if there is such a folder; raises as :meth:`exists` does."""
        return self._type_of(path) == "directory"

    def ls(self, path: str, detail: bool = True, *, refresh: bool = False) -> list[Any]:
        """List the files and folders in a folder. For the path of a file, list that file.

        Args:
            path: The folder, or a bucket.
            detail: True: return descriptions, as :meth:`info` does. False: return names.
            refresh: True: ask the service, also if the listing is kept.

        Raises:
            FileNotFoundError: There is no such file or folder.
            ConfigError: ``path`` names no bucket.
            MpreaderError: The server refuses, or can't be reached.
        """
        path = self._strip_protocol(path)
        infos = by_name([self.info(path)] if is_url(path) else self._listings.folder(path, refresh=refresh))
        return [*infos.values()] if detail else [*infos]

    def find(
        self,
        path: str,
        maxdepth: int | None = None,
        withdirs: bool = False,
        detail: bool = False,
        *,
        prefix: str | None = None,
        refresh: bool = False,
    ) -> Any:
        """List the files below a folder, at any depth. For the path of a file, list that file.

        Args:
            path: The folder, or a bucket.
            maxdepth: Number of levels of folders to list. None: all levels, which takes the fewest requests.
            withdirs: True: list folders, too.
            detail: True: return a dict of descriptions by name, as :meth:`info` gives them. False: return a list of
                names.
            prefix: List only what begins with this, behind the folder and a slash; the service selects by it.
            refresh: True: ask the service, also if the listing is kept.

        Raises:
            ValueError: ``maxdepth`` is less than 1, or ``path`` is a URL and has a ``prefix``.
            ConfigError: ``path`` names no bucket.
            MpreaderError: The server refuses, or can't be reached.
        """
        if maxdepth is not None and maxdepth < 1:
            raise ValueError(f"maxdepth must be at least 1, got {maxdepth}")
        path = self._strip_protocol(path)
        if prefix and is_url(path):
            raise ValueError(f"a URL is a file, below which there is nothing that begins with {prefix!r}")
        try:
            if is_url(path):
                found = [self.info(path)]
            else:
                found = self._listings.below(path, maxdepth, prefix or "", refresh=refresh, with_root=withdirs)
        except ObjectMissing:
            found = []  # fsspec's find() lists nothing for a path that does not exist, and does not raise
        infos = by_name(info for info in found if withdirs or info["type"] == "file")
        return infos if detail else [*infos]

    def walk(
        self,
        path: str,
        maxdepth: int | None = None,
        topdown: bool = True,
        on_error: str | Callable[[OSError], object] = "omit",
        *,
        detail: bool = False,
        refresh: bool = False,
    ) -> Iterator[tuple[str, Any, Any]]:
        """List a folder and those below it, one after the other, as ``os.walk`` does.

        Args:
            path: The folder, or a bucket.
            maxdepth: Number of levels of folders to list. None: all.
            topdown: True: a folder comes before those in it; names that the caller removes are not listed.
            on_error: ``"omit"``: a folder that is not there is left out; any other error is raised. ``"raise"``: every
                error is raised. A function: it is called with an error that is an ``OSError``.
            detail: True: yield dicts of descriptions by name. False: yield lists of names.
            refresh: True: ask the service, also if a listing is kept.

        Yields:
            The path of a folder, the names of the folders in it, and those of the files. A file that is also a folder
            is in both. Path, slash and name make a path.

        Raises:
            MpreaderError: The server refuses, or can't be reached.
        """
        if maxdepth is not None and maxdepth < 1:
            raise ValueError(f"maxdepth must be at least 1, got {maxdepth}")
        path = self._strip_protocol(path)
        entries = self._try_folder(path, on_error, refresh=refresh)
        if entries is None:
            return
        folders, files = (
            {info["name"][len(path) + 1 :]: info for info in entries if info["type"] == kind}
            for kind in ("directory", "file")
        )
        # Lists and dicts that the caller gets, and may change to have less listed.
        step: tuple[str, Any, Any] = (path, folders, files) if detail else (path, [*folders], [*files])
        if topdown:
            yield step
        if maxdepth is None or maxdepth > 1:
            deeper = None if maxdepth is None else maxdepth - 1
            for name in [*step[1]] if topdown else folders:
                yield from self.walk(f"{path}/{name}", deeper, topdown, on_error, detail=detail, refresh=refresh)
        if not topdown:
            yield step

    def du(
        self,
        path: str,
        total: bool = True,
        maxdepth: int | None = None,
        withdirs: bool = False,
        *,
        refresh: bool = False,
    ) -> Any:
        """Return the bytes of the files below a path: of all of them, or a dict by name if ``total`` is False.

        Args:
            path: The folder, or a bucket, or a file.
            total: True: return the sum.
            maxdepth: As for :meth:`find`.
            withdirs: True: name folders, too, of 0 bytes.
            refresh: As for :meth:`find`.

        Raises:
            MpreaderError: As for :meth:`find`.
        """
        infos = self.find(path, maxdepth, withdirs, detail=True, refresh=refresh)
        sizes = {name: info["size"] for name, info in infos.items()}
        return sum(sizes.values()) if total else sizes

    def glob(
        self,
        path: str,
        maxdepth: int | None = None,
        *,
        detail: bool = False,
        withdirs: bool = True,
        refresh: bool = False,
    ) -> Any:
        """Find files by a pattern, as fsspec does. An http(s) URL is never a pattern, as it may contain a ``?``.

        Args:
            path: The pattern.
            maxdepth: Number of levels for the first ``**``. None: all.
            detail: True: return a dict of descriptions by name. False: return a list of names.
            withdirs: False: leave out folders.
            refresh: As for :meth:`find`.

        Raises:
            MpreaderError: As for :meth:`find`.
        """
        url = self._strip_protocol(path)
        if is_url(url):
            return self.find(url, detail=detail)
        found = super().glob(stringify_path(path), maxdepth, detail=True, refresh=refresh)
        infos = {name: info for name, info in found.items() if withdirs or info["type"] == "file"}
        return infos if detail else [*infos]

    def expand_path(
        self,
        path: Any,
        recursive: bool = False,
        maxdepth: int | None = None,
        *,
        assume_literal: bool = False,
        refresh: bool = False,
    ) -> list[str]:
        """Return the sorted paths that a path, a pattern or a list of them stands for.

        Args:
            path: A path, a path with wildcards, or a list of them.
            recursive: True: also all that is below.
            maxdepth: As for :meth:`find`.
            assume_literal: True: nothing in a path is a wildcard.
            refresh: As for :meth:`find`.

        Raises:
            FileNotFoundError: There is nothing.
            MpreaderError: As for :meth:`find`.
        """
        literal = {"assume_literal": True} if assume_literal else {}  # older versions of fsspec don't know it
        paths: list[str] = super().expand_path(path, recursive, maxdepth, refresh=refresh, **literal)
        return paths

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget the kept listings at, below and above a path. None: all of them."""
        super().invalidate_cache(path)
        self._listings.forget(None if path is None else self._strip_protocol(path))

    def checksum(self, path: str) -> int:
        """Return the version token of :meth:`ukey` as a number."""
        return int(self.ukey(path), 16)

    def ukey(self, path: str) -> str:
        """Return a version token of a file as text: it differs whenever the file was overwritten by another content.

        Where the server gives no strong ETag, it differs with everything that the server says of the version. It is
        never from a kept listing.
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
        """Describe a file as it is now; raises IsADirectoryError for a folder."""
        info = self.info(path, refresh=True)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return info

    def _type_of(self, path: str, *, refresh: bool = False) -> str | None:
        try:
            kind: str = self.info(path, refresh=refresh)["type"]
        except ObjectMissing:  # and no other error, such as the FileNotFoundError of a file with credentials
            return None
        return kind

    def _try_folder(
        self, path: str, on_error: str | Callable[[OSError], object], *, refresh: bool
    ) -> list[Info] | None:
        """List a folder; None if it can't be listed and :meth:`walk` goes on without it."""
        try:
            return [self.info(path)] if is_url(path) else self._listings.folder(path, refresh=refresh)
        except OSError as error:
            if callable(on_error):
                on_error(error)
            elif on_error == "raise" or not isinstance(error, ObjectMissing):
                raise
            return None


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
