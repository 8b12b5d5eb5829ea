"""State of a whole checkpoint: the dictionary that a load fills, made from ``.metadata``.

The loader of whole checkpoints, the inspection and the benchmark use it. It must not read anything of the checkpoint. A
state has one value for each name of an item: for a tensor, a tensor without memory at first and one with memory later;
for any other item None, until it is loaded. :func:`nest` turns the state into the nested one that was saved.

``.metadata`` may be forged. Everything that fails because of its contents is raised as a :class:`MetadataRefused`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan

from mpreader.dcp.metadata import MetadataRefused
from mpreader.dcp.new_memory import unfilled_memory
from mpreader.errors import MpreaderError, PlanError

__all__ = [
    "allocate",
    "empty_state",
    "errors_as_refused",
    "name_patterns",
    "nest",
    "plan_whole",
    "state_bytes",
    "touch_memory",
]

# A list of the state has empty places for elements that were not selected or not saved. Only a forged .metadata has
# more of them than this: without a bound, one large index in it could fill the memory.
_MAX_EMPTY_PLACES: Final = 1 << 20


def name_patterns(match: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Returns the patterns of a ``match`` argument as a tuple; None selects everything."""
    return None if match is None else ((match,) if isinstance(match, str) else tuple(match))


def empty_state(metadata: Metadata, match: str | Iterable[str] | None = None) -> dict[str, Any]:
    """Make the state of a checkpoint, not nested and without memory.

    Args:
        metadata: Metadata of the checkpoint.
        match: Patterns of the names of items, as for :func:`load_checkpoint`. None: all items.

    Returns:
        For each item a tensor on the meta device (it has a shape but no memory), or None if it is no tensor.

    Raises:
        PlanError: The checkpoint has items, but none of them matches.
        MetadataRefused: The description of an item is invalid.
    """
    entries: dict[str, Any] = metadata.state_dict_metadata  # Any: a forged one may have values of any type
    patterns = name_patterns(match)
    with errors_as_refused(metadata):
        state = {
            fqn: _empty(entry)
            for fqn, entry in entries.items()
            if patterns is None or any(fnmatchcase(fqn, pattern) for pattern in patterns)
        }
    if patterns is not None and entries and not state:
        raise PlanError(
            f"nothing in the checkpoint matches {' or '.join(map(repr, patterns))}; it holds {len(entries)} items, the "
            f"first is {next(iter(entries))!r}"
        )
    return state


def state_bytes(state: Mapping[str, Any]) -> int:
    """Returns the number of bytes of the tensors of a state, with or without memory."""
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def allocate(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a state from :func:`empty_state` whose tensors have memory; their contents are undefined."""
    with unfilled_memory():
        return {
            fqn: torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else None
            for fqn, value in state.items()
        }


def touch_memory(state: Mapping[str, Any]) -> None:
    """Fill the tensors of a state from :func:`allocate` with zeros, so that a timed load pays for no page faults."""
    for value in state.values():
        if isinstance(value, torch.Tensor) and value.numel():
            # As bytes, since torch can't fill tensors of every type.
            value.reshape(-1).view(torch.uint8).zero_()


def plan_whole(metadata: Metadata, state: Mapping[str, Any]) -> LoadPlan:
    """Plan the reads that fill a state from :func:`empty_state` or :func:`allocate`.

    Raises:
        MetadataRefused: The description of an item is invalid, or there is no location of its bytes.
    """
    with errors_as_refused(metadata):
        if metadata.storage_data is None:
            raise ValueError("it doesn't say where they are stored")
        plan = create_default_local_load_plan(dict(state), metadata)
        for item in plan.items:
            # Here, where the KeyError becomes a MetadataRefused: the storage reader's own KeyError would say nothing.
            metadata.storage_data[item.storage_index]
    return plan


def nest(state: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Returns the state as it was saved: dictionaries and lists, nested.

    Args:
        state: The state; it is not changed.
        metadata: Metadata of the checkpoint. Its ``planner_data`` has the path of each item within the nested state. An
            item without a path is placed at the top, under its name.

    Raises:
        MetadataRefused: A path is invalid.
    """
    # DCP saves paths only if it has flattened the state. Otherwise planner_data is None, or whatever a planner saved.
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    nested: dict[str, Any] = {}
    with errors_as_refused(metadata):
        _check_paths([paths[fqn] for fqn in state if fqn in paths])
        for fqn, value in state.items():
            set_element(nested, paths.get(fqn, (fqn,)), value)
    return nested


def _check_paths(paths: list[Any]) -> None:
    """Refuse paths that would fill the memory, or count from the end of a list.

    Raises:
        ValueError: A path is refused.
    """
    lengths: dict[tuple[str | int, ...], int] = {}  # length of each list, by the path to the list
    for path in paths:
        if not _is_path(path):
            raise ValueError(f"a path within the state is {path!r}")
        for depth, step in enumerate(path):
            if type(step) is int:
                lengths[path[:depth]] = max(lengths.get(path[:depth], 0), step + 1)
    # An honest path fills at most one place of a list with each of its steps; all other places are empty.
    if sum(lengths.values()) > sum(map(len, paths)) + _MAX_EMPTY_PLACES:
        raise ValueError("its lists have more places than items")


def _is_path(path: object) -> bool:
    """Returns True if ``path`` is a tuple of keys (text) and list indices (not negative) that begins with a key."""
    # Exact types, since True is an int, too, and a subclass may compare as it likes.
    if not isinstance(path, tuple) or not path or type(path[0]) is not str:
        return False
    return all(type(step) is str or (type(step) is int and step >= 0) for step in path)


def _empty(entry: object) -> torch.Tensor | None:
    """Returns the value in an empty state for an item's description in ``.metadata``."""
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    if isinstance(entry, BytesStorageMetadata):
        return None
    raise TypeError(f"an item is described by {type(entry).__name__}")


@contextlib.contextmanager
def errors_as_refused(metadata: Metadata) -> Iterator[None]:
    """Raise every error of the block as ``MetadataRefused``, for code that fails only if ``.metadata`` is wrong."""
    try:
        yield
    except MpreaderError:
        raise  # has a clear text already
    except Exception as error:  # torch's functions fail in many ways if objects of .metadata have unexpected values
        raise MetadataRefused(
            f"the checkpoint's .metadata describes {len(metadata.state_dict_metadata)} items, but not so that they "
            f"could be loaded: {type(error).__name__}: {error}"
        ) from error
