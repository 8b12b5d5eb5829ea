"""Wanted tensors: which tensors of which files a load takes, which box of each, and the tensor that it is copied into.

This module plans and receives nothing: whatever is wrong with the arguments of a load is found here, before a byte of
a tensor is requested.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mpreader.dcp.new_memory import unfilled_memory
from mpreader.errors import ConfigError, PlanError
from mpreader.fetch.safetensors import StoredFile
from mpreader.formats.layout import TensorLayout
from mpreader.formats.safetensors import StoredTensor
from mpreader.formats.torch_tensors import layout_of
from mpreader.safetensors.index import BoxIndex, box_index
from mpreader.sources.uri import without_secrets

__all__ = [
    "Slices",
    "WantedTensor",
    "check_names",
    "choose",
    "converted",
    "empty_targets",
    "loaded",
    "want_new",
    "want_targets",
]

Slices = Mapping[str, Any] | Callable[[str, tuple[int, ...]], Any]
"""Index expressions by name, or a function of name and shape that returns one; None stands for the whole tensor."""

_CONVERTED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Types that ``dtype=`` converts; all others are kept, since quantized values mean nothing without their scales."""


class WantedTensor(NamedTuple):
    """Tensor of a file, or a box of it, and the tensor that it is copied into.

    Attributes:
        file: The file that it is stored in.
        stored: Its entry in the header.
        layout: Layout of the whole tensor in its bytes of the file.
        asked: The box that is wanted, and the index expression that is left to apply to it.
        target: Tensor of the shape of the box, whose elements are overwritten.
    """

    file: StoredFile
    stored: StoredTensor
    layout: TensorLayout
    asked: BoxIndex
    target: torch.Tensor


def converted(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return the type that a tensor of type ``dtype`` is loaded as if the type ``wanted`` is asked for."""
    return wanted if wanted is not None and dtype in _CONVERTED else dtype


def check_names(names: Collection[str] | None) -> None:
    """Check an argument ``names``.

    Raises:
        ConfigError: It is not a collection, or is a single string, which would be taken for a collection of letters.
    """
    if isinstance(names, str):
        raise ConfigError(f"names is a collection of names: write [{names!r}]")
    if names is not None and not isinstance(names, Collection):  # an iterator would be empty at the second look
        raise ConfigError(f"names is a collection of names, such as a list, got {type(names).__name__}")


def choose(files: Sequence[StoredFile], names: Collection[str] | None) -> list[tuple[StoredFile, StoredTensor]]:
    """Return the tensors of these names with their files, in the order of their bytes; with None, all of them.

    Raises:
        PlanError: No file has a tensor of one of the names.
    """
    wanted = None if names is None else set(names)
    chosen = [
        (file, stored)
        for file in files
        for stored in file.header.tensors.values()
        if wanted is None or stored.name in wanted
    ]
    if wanted is not None and len(chosen) < len(wanted):
        missing = sorted(wanted.difference(stored.name for _, stored in chosen))
        others = f", and {len(missing) - 1} others are not there either" if len(missing) > 1 else ""
        where = without_secrets(files[0].uri) if files else "the files"  # an index may name none
        where += f" and {len(files) - 1} other files" if len(files) > 1 else ""
        raise PlanError(f"no tensor {missing[0]!r} is in {where}{others}")
    return chosen


def empty_targets(chosen: Sequence[tuple[StoredFile, StoredTensor]]) -> dict[str, torch.Tensor]:
    """Return a new tensor in the memory of the CPU for each of those that were chosen; their contents are undefined.

    Raises:
        PlanError: This torch has no such type.
    """
    with unfilled_memory():
        layouts = [(stored.name, layout_of(stored)) for _, stored in chosen]
        return {name: torch.empty(layout.size, dtype=layout.dtype) for name, layout in layouts}


def want_new(
    chosen: Sequence[tuple[StoredFile, StoredTensor]],
    slices: Slices | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> Iterator[WantedTensor]:
    """Make a new tensor for each that was chosen.

    Raises:
        PlanError: An index expression does not fit its tensor, or this version of torch lacks a type.
    """
    for file, stored in chosen:
        layout, index = _slice_of(stored, slices)
        with unfilled_memory():
            target = torch.empty(index.lengths, dtype=converted(layout.dtype, dtype), device=device)
        yield _as_bytes(WantedTensor(file, stored, layout, index, target))


def want_targets(
    chosen: Sequence[tuple[StoredFile, StoredTensor]], slices: Slices | None, targets: Mapping[str, torch.Tensor]
) -> Iterator[WantedTensor]:
    """Take existing tensors as the targets of what was chosen; of a distributed one, this rank's part is loaded.

    Raises:
        PlanError: A target has another shape than what is loaded into it, or can't be filled; an index expression does
            not fit its tensor; or this version of torch lacks a type.
    """
    for file, stored in chosen:
        layout, index = _slice_of(stored, slices)
        target = _checked_target(stored.name, targets[stored.name])
        if hasattr(target, "__create_chunk_list__"):  # a DTensor
            index, target = _own_part(stored, layout, index, target)
        shape = torch.empty(index.lengths, device="meta")[index.rest].shape if index.rest else index.lengths
        _check_shape(stored.name, shape, target)
        if index.rest:
            if any(isinstance(entry, slice) and entry.step > 1 for entry in index.rest):
                raise PlanError(f"tensor {stored.name!r}: slices that go into given tensors have the step 1")
            target = target.reshape(index.lengths) if target.is_contiguous() else _expanded(target, index)
        yield _as_bytes(WantedTensor(file, stored, layout, index, target))


def _checked_target(name: str, target: torch.Tensor) -> torch.Tensor:
    """Return a target without its gradient, after a check that its elements can be overwritten one by one."""
    if torch.nn.parameter.is_lazy(target):
        raise PlanError(f"tensor {name!r} can't be loaded into a parameter that has no shape yet")
    if target.is_nested or target.layout != torch.strided:
        raise PlanError(f"tensor {name!r} can't be loaded into one that is nested or sparse")
    if any(step == 0 and size > 1 for size, step in zip(target.shape, target.stride(), strict=True)):
        raise PlanError(f"tensor {name!r} can't be loaded into one whose elements share memory (expand)")
    return target.detach()


def loaded(wanted: WantedTensor) -> torch.Tensor:
    """Return the tensor that was asked for, once its box has been loaded into a target of :func:`want_new`."""
    target = wanted.target
    if wanted.stored.dtype == "F4":
        target = target.view(layout_of(wanted.stored).dtype)
    if not wanted.asked.rest:
        return target
    rest = target[wanted.asked.rest]
    # A view would keep all of the box in memory.
    return rest.clone() if rest.numel() < target.numel() else rest


def _check_shape(name: str, shape: Sequence[int], target: torch.Tensor) -> None:
    if tuple(shape) != tuple(target.shape):
        raise PlanError(f"tensor {name!r} of shape {list(shape)} can't be loaded into one of {list(target.shape)}")


def _expanded(target: torch.Tensor, index: BoxIndex) -> torch.Tensor:
    """Return a view of a target that has, with a size of 1, each dimension that an integer of the index removes."""
    for dim, entry in enumerate(index.rest):
        if not isinstance(entry, slice):
            target = target.unsqueeze(dim)
    return target


def _slice_of(stored: StoredTensor, slices: Slices | None) -> tuple[TensorLayout, BoxIndex]:
    layout = layout_of(stored)
    if slices is None:
        index = None
    elif callable(slices):
        index = slices(stored.name, layout.size)
    else:
        index = slices.get(stored.name)
    if index is None:
        return layout, BoxIndex.whole(layout.size)
    try:
        return layout, box_index(index, layout.size)
    except (PlanError, IndexError) as error:
        raise PlanError(f"tensor {stored.name!r} of shape {list(layout.size)}: {error}") from None


def _own_part(
    stored: StoredTensor, layout: TensorLayout, index: BoxIndex, target: Any
) -> tuple[BoxIndex, torch.Tensor]:
    """Return the box of a distributed tensor that this rank holds, and the local tensor that holds it."""
    if index.lengths != layout.size or index.rest:
        raise PlanError(
            f"tensor {stored.name!r}: slices can't be given for a DTensor: its placements say what is loaded"
        )
    _check_shape(stored.name, layout.size, target)
    chunks = target.__create_chunk_list__()
    local: torch.Tensor = target.to_local()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
        if local.numel():
            raise PlanError(
                f"tensor {stored.name!r}: this rank's part of the DTensor is not one box; load it by torch's dcp.load"
            )
        return BoxIndex.whole(tuple(local.shape)), local
    return BoxIndex(tuple(chunks[0].offsets), tuple(chunks[0].sizes)), local


def _as_bytes(wanted: WantedTensor) -> WantedTensor:
    """Have elements of four bits copied as bytes: torch can't copy tensors of its type for two of them."""
    layout, target = wanted.layout, wanted.target
    if wanted.stored.dtype != "F4":
        return wanted
    if target.dtype != layout.dtype:
        raise PlanError(f"tensor {wanted.stored.name!r} of {layout.dtype} can't be converted to {target.dtype}")
    return wanted._replace(layout=layout._replace(dtype=torch.uint8), target=target.view(torch.uint8))
