"""Ranges of a load plan: converts the items that DCP is going to read into the byte ranges of each file.

It is used by the constructors that are given a plan and by ``mpreader inspect``; :mod:`mpreader.dcp` also uses its
checks of names and extents. It is pure, and must not import torch. The location of an item comes from the metadata of
the checkpoint, which is not trusted: a location outside of the checkpoint is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mpreader.errors import PlanError
from mpreader.ranges import ItemRange
from mpreader.readers.protocols import PlanItem, StoredItem

__all__ = ["is_extent", "is_inside", "item_ranges_by_file", "range_of", "uri_of"]


def item_ranges_by_file(
    plan_items: Sequence[PlanItem], storage_data: Mapping[Any, StoredItem], base_path: str | os.PathLike[str]
) -> dict[str, list[ItemRange]]:
    """Group the ranges of a load plan by file.

    Args:
        plan_items: The plan's items, in the order in which they will be read.
        storage_data: Location of each item, by its ``storage_index``.
        base_path: URI of the checkpoint.

    Returns:
        The ranges of each file, by the URI under which DCP opens it; files and ranges are in the order of
        ``plan_items``.

    Raises:
        ValueError: There are plan items, but no ``storage_data``.
        PlanError: An item lies outside of the checkpoint, or has a negative offset or length.
    """
    if plan_items and not storage_data:
        raise ValueError(
            "storage_data must not be empty: it says where the plan's items are stored; "
            "call set_up_storage_reader(metadata) before prepare_local_plan(plan)"
        )
    ranges_by_file: dict[str, list[ItemRange]] = {}
    for plan_item in plan_items:
        stored = storage_data[plan_item.storage_index]
        uri = uri_of(base_path, stored.relative_path)
        ranges_by_file.setdefault(uri, []).append(range_of(stored))
    return ranges_by_file


def is_inside(path: object) -> bool:
    """Returns True if ``path`` is a relative path to a file inside of the checkpoint."""
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        return False
    return {".", ".."}.isdisjoint(path.split("/"))


def is_extent(offset: object, length: object) -> bool:
    """Returns True if ``offset`` and ``length`` are whole numbers that are not negative."""
    # The exact type, because True and False are ints to isinstance().
    return type(offset) is int and type(length) is int and offset >= 0 and length >= 0


def uri_of(base_path: str | os.PathLike[str], relative_path: object) -> str:
    """Returns the URI under which DCP opens a file of the checkpoint at ``base_path``.

    Raises:
        PlanError: The file lies outside of the checkpoint.
    """
    base = os.fspath(base_path)
    if not is_inside(relative_path):
        raise PlanError(f"the checkpoint's metadata names a file outside of the checkpoint: {relative_path!r}")
    # The file systems of DCP join them in the same way when they open the file, and the reader is found by the URI: a
    # slash at the end of base_path is not doubled.
    return f"{base}{relative_path}" if base.endswith("/") else f"{base}/{relative_path}"


def range_of(stored: StoredItem) -> ItemRange:
    """Returns the bytes of an item.

    Raises:
        PlanError: Its offset or length is negative or no whole number.
    """
    if not is_extent(stored.offset, stored.length):
        raise PlanError(
            f"the checkpoint's metadata gives an item of {stored.relative_path!r} an impossible place: "
            f"offset {stored.offset!r}, length {stored.length!r}"
        )
    return ItemRange(stored.offset, stored.offset + stored.length)
