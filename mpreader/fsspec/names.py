"""Names of the file system: what there is below a path, and what a pattern stands for.

Objects of S3 have keys, not folders. A key may therefore also be the name of a folder: with ``d/x`` and ``d/x/0``,
``d/x`` is a file and has a file below it. Such a name is one thing here: a file, in every description; it is listed
once, and what lies below it is found, too.

It is the part of the file system between :mod:`mpreader.fsspec.description` and :mod:`mpreader.fsspec.copying`. Buckets
are listed, and listings kept, by :mod:`mpreader.fsspec.listing_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fsspec.utils import stringify_path

from mpreader.errors import ObjectMissing
from mpreader.fsspec.description import DescribingFileSystem
from mpreader.fsspec.listing import Info
from mpreader.fsspec.listing_cache import by_name
from mpreader.fsspec.slices import is_url

__all__ = ["NamedFileSystem"]


class NamedFileSystem(DescribingFileSystem):
    """The methods of the file system that find files, in folders and by patterns."""

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
