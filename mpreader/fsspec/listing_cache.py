"""Listing cache of the file system: of folders and of what is below them, asked for or kept from before.

:mod:`mpreader.fsspec.description` and :mod:`mpreader.fsspec.names` use it; requests are made by
:mod:`mpreader.fsspec.listing`. Nothing is kept unless the caches, which are fsspec's, were made to keep it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mpreader.errors import ObjectMissing
from mpreader.fsspec.listing import Info, describe, file_named, folder, list_below, list_folder

if TYPE_CHECKING:
    from mpreader.fsspec.slices import SliceReader

__all__ = ["ListingCache", "by_name"]


class ListingCache:
    """Listings of the buckets of one file system. Thread-safe, as far as fsspec's caches are.

    A path is ``bucket/key``. A file that is also a folder is listed as both, in two descriptions.

    Args:
        reader: Reader of slices, which has the client.
        folders: Cache (fsspec's ``DirCache``) of the listings of single folders.
        found: Cache of the listings of all that is below a folder, at any depth.
    """

    def __init__(self, reader: SliceReader, folders: Any, found: Any) -> None:
        self._reader = reader
        self._folders = folders
        self._found = found

    def folder(self, path: str, begin: str = "", *, refresh: bool) -> list[Info]:
        """List a folder, as :func:`list_folder` does.

        Args:
            path: The folder, or a bucket.
            begin: Beginning of the names to list.
            refresh: True: ask for it, also if it is kept.
        """
        client = self._reader.client()
        if begin:
            return list_folder(client, path, begin)
        return _kept(self._folders, path, lambda: list_folder(client, path), refresh=refresh)

    def below(self, path: str, maxdepth: int | None, prefix: str, *, refresh: bool, with_root: bool) -> list[Info]:
        """List what is below a path, folders included.

        Args:
            path: The folder, or a bucket, or a file.
            maxdepth: Number of levels. None: all.
            prefix: Beginning of the names to list, relative to the path.
            refresh: True: ask for it, also if it is kept.
            with_root: True: describe the path itself, too, if there is no prefix.

        Raises:
            ObjectMissing: There is nothing at or below the path.
        """
        client = self._reader.client()
        if maxdepth is not None:
            # A listing can't be limited in depth, so that each folder takes a request.
            found = [*self._levels(path, maxdepth, prefix, refresh=refresh)]
        elif prefix:
            found = [*list_below(client, path, prefix)]
        else:
            found = _kept(self._found, path, lambda: [*list_below(client, path)], refresh=refresh)
        if prefix:  # which may have a slash at its end, where a folder's name has none
            return [info for info in found if info["name"].startswith(f"{path}/{prefix}")]
        # Without any file this may be the path of a file, also beside an empty folder of that name.
        if with_root or ("/" in path and not any(info["type"] == "file" for info in found)):
            found.append(self._root(path, bool(found), refresh=refresh))
        return found

    def kept_info(self, path: str) -> Info | None:
        """Return a description from the kept listing of the folder that the path is in; None if there is none."""
        try:
            entries = self._folders[path.rpartition("/")[0].rstrip("/")]
        except KeyError:
            return None
        info = by_name(entries).get(path)
        return None if info is None else dict(info)

    def forget(self, path: str | None) -> None:
        """Forget the listings at, below and above a path. None: all of them."""
        for cache in (self._folders, self._found):
            for kept in [*cache]:
                # What lies above the path names it, too.
                if path is None or f"{path}/".startswith(f"{kept}/") or f"{kept}/".startswith(f"{path}/"):
                    cache.pop(kept, None)

    def _levels(self, path: str, maxdepth: int, prefix: str = "", *, refresh: bool) -> Iterator[Info]:
        """Yield what is in a folder, and in those folders of it that begin with the prefix, down to a depth."""
        inner, _, begin = prefix.rpartition("/")
        if inner:
            path, maxdepth = f"{path}/{inner}", maxdepth - len(inner.split("/"))
        if maxdepth < 1:
            return
        for info in self.folder(path, begin, refresh=refresh):
            yield info
            if info["type"] == "directory":
                with contextlib.suppress(ObjectMissing):  # it was deleted since its folder was listed
                    yield from self._levels(info["name"], maxdepth - 1, refresh=refresh)

    def _root(self, path: str, is_folder: bool, *, refresh: bool) -> Info:
        """Describe a path, of which it is known whether something is below it."""
        if "/" not in path:
            return folder(path)
        client = self._reader.client()
        if not is_folder:
            return describe(client, path)
        # Kept with the listings of what is below; no path ends in a slash, so that none has the same name.
        return _kept(self._found, f"{path}/", lambda: [file_named(client, path) or folder(path)], refresh=refresh)[0]


def by_name(infos: Iterable[Info]) -> dict[str, Info]:
    """Return descriptions by name, in the order of the names: of a file that is also a folder, that of the file."""
    by_name: dict[str, Info] = {}
    for info in infos:
        if info["type"] == "file" or info["name"] not in by_name:
            by_name[info["name"]] = info
    return {name: by_name[name] for name in sorted(by_name)}


def _kept(cache: Any, path: str, ask: Callable[[], list[Info]], *, refresh: bool) -> list[Info]:
    """Return a listing from a ``DirCache``, or ask for it and keep it."""
    if not refresh:
        with contextlib.suppress(KeyError):
            return [dict(info) for info in cache[path]]  # copies, since they are the caller's
    infos = ask()
    cache[path] = [dict(info) for info in infos] if cache.use_listings_cache else infos
    return infos
