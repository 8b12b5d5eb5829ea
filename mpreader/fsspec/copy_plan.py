"""Plan of a copy of many files to local ones: which file goes where, and which folders are made.

It is used by :mod:`mpreader.fsspec.copying` only, and makes no requests. A store may have what a local disk can't:
a file and a folder of one name (``d/x`` and ``d/x/0``), and names that differ only in what a disk leaves out (``d//x``
and ``d/x``). Nothing of that is overwritten or left out without a word.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from typing import NamedTuple

from fsspec.implementations.local import make_path_posix, trailing_sep
from fsspec.utils import other_paths

from mpreader.errors import PlanError

__all__ = ["Copy", "local_paths", "plan_copies"]


class Copy(NamedTuple):
    """A file or folder, and its local path.

    Attributes:
        remote: Path of it in the store.
        local: Local path.
    """

    remote: str
    local: str


def local_paths(remote: str | Sequence[str], expanded: Sequence[str], local: str | Sequence[str]) -> list[str]:
    """Return the local path for each path that is copied, as fsspec's ``get`` names them.

    Args:
        remote: What the caller has named: a path, a pattern or a list.
        expanded: The paths that this stands for.
        local: What the caller has named: a path, or a list with one for each.

    Raises:
        PlanError: A path leads out of ``local``, or there are not as many local paths as others.
    """
    if not isinstance(local, str):
        if len(local) != len(expanded):
            raise PlanError(f"{len(expanded)} files need as many local paths, got {len(local)}")
        return [*local]
    local = str(make_path_posix(local))
    is_one = isinstance(remote, str)
    into_folder = trailing_sep(local) or os.path.isdir(local)
    pattern = isinstance(remote, str) and glob.has_magic(remote)
    exists = is_one and (len(expanded) == 1 if pattern else into_folder and not trailing_sep(remote))
    paths: list[str] = other_paths([*expanded], local, exists=exists, flatten=not is_one)
    root = os.path.join(os.path.abspath(local), "")
    for path in paths:
        if not os.path.join(os.path.abspath(path), "").startswith(root):
            raise PlanError(f"{path!r} is outside of {local!r}: a key has '..' in it; copy that file by itself")
    return paths


def plan_copies(copies: Sequence[Copy]) -> tuple[list[Copy], list[Copy]]:
    """Divide what is to be copied.

    Returns:
        Those that have a local path of their own; and those that can't be copied as files, since another one needs
        their local path, as a folder or for a file.
    """
    places = [os.path.abspath(copy.local) for copy in copies]
    folders: set[str] = set()
    for place in places:
        while (place := os.path.dirname(place)) not in folders:
            folders.add(place)
    possible: dict[str, Copy] = {}
    others: list[Copy] = []
    for copy, place in zip(copies, places, strict=True):
        if place in folders or place in possible:
            others.append(copy)
        else:
            possible[place] = copy
    return [*possible.values()], others
