"""State of a whole checkpoint, made of what its ``.metadata`` says. No bytes of the checkpoint are read here.

A state is a dictionary of the checkpoint's items by name: of each tensor, first without and then with memory; of each
other item None, until it is loaded. :func:`nest` makes of it what was saved. What ``.metadata`` says may be forged:
whatever fails because of it is a :class:`MetadataRefused`.
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
from mpreader.errors import MpreaderError, PlanError

__all__ = ["allocate", "described", "empty_state", "name_patterns", "nest", "plan_whole", "state_bytes", "touch_memory"]

# Lists may have elements that nothing was saved for; only a forged .metadata has more of them than this.
_MOST_EMPTY_ELEMENTS: Final = 1 << 20


def name_patterns(match: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Returns the patterns of a ``match`` argument as a tuple; None selects everything."""
    return None if match is None else ((match,) if isinstance(match, str) else tuple(match))


def empty_state(metadata: Metadata, match: str | Iterable[str] | None = None) -> dict[str, Any]:
    """Make the state of a checkpoint, not nested and without memory.

    Args:
        metadata: The checkpoint's.
        match: Patterns, as for :func:`load_checkpoint`.

    Returns:
        For each item a tensor on the meta device, or None if it is no tensor.

    Raises:
        PlanError: No name matches, though there are some.
        MetadataRefused: An item is described that can't be.
    """
    entries: dict[str, Any] = metadata.state_dict_metadata
    patterns = name_patterns(match)
    with described(metadata):
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
    """Returns the bytes of the tensors of a state."""
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def allocate(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same state with its tensors in memory, not filled."""
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
        MetadataRefused: An item is described that can't be, or was stored nowhere.
    """
    with described(metadata):
        if metadata.storage_data is None:
            raise ValueError("it doesn't say where they are stored")
        plan = create_default_local_load_plan(dict(state), metadata)
        for item in plan.items:
            metadata.storage_data[item.storage_index]  # raises KeyError if it was stored nowhere
    return plan


def nest(state: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Returns the state as it was saved: dictionaries in dictionaries, and lists.

    Raises:
        MetadataRefused: A path within the state can't be one.
    """
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    nested: dict[str, Any] = {}
    with described(metadata):
        _check_paths([paths[fqn] for fqn in state if fqn in paths])
        for fqn, value in state.items():
            set_element(nested, paths.get(fqn, (fqn,)), value)
    return nested


def _check_paths(paths: list[Any]) -> None:
    """Refuse paths that would take memory without end, or lead backwards through a list."""
    lengths: dict[tuple[str | int, ...], int] = {}  # of each list, by the path to it
    for path in paths:
        if not _is_path(path):
            raise ValueError(f"a path within the state is {path!r}")
        for depth, step in enumerate(path):
            if type(step) is int:
                lengths[path[:depth]] = max(lengths.get(path[:depth], 0), step + 1)
    if sum(lengths.values()) > sum(map(len, paths)) + _MOST_EMPTY_ELEMENTS:
        raise ValueError("its lists have more places than items")


def _is_path(path: object) -> bool:
    if not isinstance(path, tuple) or not path or type(path[0]) is not str:
        return False
    return all(type(step) is str or (type(step) is int and step >= 0) for step in path)


def _empty(entry: object) -> torch.Tensor | None:
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    if isinstance(entry, BytesStorageMetadata):
        return None
    raise TypeError(f"an item is described by {type(entry).__name__}")


@contextlib.contextmanager
def described(metadata: Metadata) -> Iterator[None]:
    """Turn whatever fails in the block into ``MetadataRefused``: its cause is what ``.metadata`` says."""
    try:
        yield
    except MpreaderError:
        raise
    except Exception as error:
        raise MetadataRefused(
            f"the checkpoint's .metadata describes {len(metadata.state_dict_metadata)} items, but not so that they "
            f"could be loaded: {type(error).__name__}: {error}"
        ) from error
