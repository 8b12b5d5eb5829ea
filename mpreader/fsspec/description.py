"""Description of a path in the file system: type, size, version and time of one file or folder.

It is the part of the file system between :mod:`mpreader.fsspec.asynchronous` and :mod:`mpreader.fsspec.names`. It also
holds what the parts above read with: the reader of slices and the listings.
"""

from __future__ import annotations

import datetime
import errno
import os
from typing import Any

from fsspec.dircache import DirCache
from fsspec.utils import stringify_path, tokenize

from mpreader.config import PoolConfig, S3ClientConfig, check_type
from mpreader.errors import ConfigError, ObjectMissing
from mpreader.fsspec.asynchronous import ThreadedFileSystem
from mpreader.fsspec.listing import FileInfo, Info, describe, version_of
from mpreader.fsspec.listing_cache import ListingCache
from mpreader.fsspec.slices import SliceReader, is_url
from mpreader.pool.worker.version import is_strong

__all__ = ["DescribingFileSystem"]


class DescribingFileSystem(ThreadedFileSystem):
    """The methods of the file system that describe one file or folder, by a HEAD or by a kept listing.

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
        self._listings = ListingCache(self._reader, self.dircache, DirCache(**cache))

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


def _is_duration(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
