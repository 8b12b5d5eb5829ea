"""Given tensors: those of a state dictionary or a module, the argument ``out``, that a load fills.

Tensors on ``meta`` have no memory: new ones take their place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from mpreader.dcp.new_memory import unfilled_memory
from mpreader.errors import ConfigError, PlanError

__all__ = ["Targets", "assign", "targets_of"]


class Targets(NamedTuple):
    """Tensors to fill.

    Attributes:
        tensors: The tensors, by their names in the files.
        others: For each of these names, the further names that ``out`` has for the same tensor, as for tied weights.
    """

    tensors: dict[str, torch.Tensor]
    others: Mapping[str, list[str]]


def targets_of(
    out: Mapping[str, torch.Tensor] | torch.nn.Module,
    stored: Collection[str],
    names: Collection[str] | None,
    device: str | torch.device,
) -> Targets:
    """Return the tensors to fill, with new ones on ``device`` in place of those on ``meta``.

    Args:
        out: A state dictionary, or a module. Where it has a tensor under several names, such as tied weights, the files
            must have one of them.
        stored: Names of the tensors in the files.
        names: Names of the tensors that are wanted. None: all that ``out`` has.
        device: Device of the new tensors.

    Raises:
        ConfigError: ``out`` is neither of these, or has values that are no tensors.
        PlanError: The files lack a tensor of ``out``, or ``out`` lacks one of ``names``.
    """
    wanted = _tensors_of(out)
    if names is not None:
        unknown = sorted(set(names).difference(wanted))
        if unknown:
            raise PlanError(f"out has no tensor {unknown[0]!r}")
        wanted = {name: wanted[name] for name in names}
    same: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        same.setdefault(id(tensor), []).append(name)
    found, others, missing = {}, {}, []
    for group in same.values():
        there = [name for name in group if name in stored]
        if not there:
            missing.append(group[0])
            continue
        found[there[0]] = _with_memory(wanted[there[0]], device)
        others[there[0]] = [name for name in group if name != there[0]]
    if missing:
        more = f", nor {len(missing) - 1} others of out" if len(missing) > 1 else ""
        raise PlanError(f"no tensor {missing[0]!r} is in the files{more}; give names= to load only some")
    return Targets(found, others)


def assign(out: Mapping[str, torch.Tensor] | torch.nn.Module, targets: Targets) -> dict[str, torch.Tensor]:
    """Put the new tensors into a module in place of those that were on ``meta``; a state dictionary is left unchanged.

    Returns:
        All tensors that were filled, by all their names.
    """
    filled: dict[str, torch.Tensor] = {}
    for name, tensor in targets.tensors.items():
        names = [name, *targets.others[name]]
        if isinstance(out, torch.nn.Module) and _get(out, name).is_meta:
            tensor = _like(_get(out, name), tensor)
            for each in names:
                owner, leaf = _owner(out, each)
                places: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                places[leaf] = tensor
        filled.update(dict.fromkeys(names, tensor))
    return filled


def _tensors_of(out: Any) -> dict[str, torch.Tensor]:
    if isinstance(out, torch.nn.Module):
        # By its parameters and buffers rather than state_dict(), whose hooks may rename, gather or copy them.
        named: dict[str, torch.Tensor] = dict(out.named_parameters(remove_duplicate=False))
        for name, buffer in out.named_buffers(remove_duplicate=False):
            owner, leaf = _owner(out, name)
            if leaf not in owner._non_persistent_buffers_set:
                named[name] = buffer
        return named
    if not isinstance(out, Mapping):
        raise ConfigError(f"out is a state dictionary or a torch.nn.Module, got {type(out).__name__}")
    for name, tensor in out.items():
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"out has {name!r} of type {type(tensor).__name__}, which is no tensor")
    return dict(out)


def _with_memory(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor
    with unfilled_memory(), torch.no_grad():
        return torch.empty_like(tensor, device=device, requires_grad=False)


def _like(old: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the form in which a module holds ``old``: a parameter or not, with the same attributes."""
    if isinstance(old, torch.nn.Parameter):
        tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    for name, value in old.__dict__.items():
        tensor.__dict__.setdefault(name, value)  # a subclass keeps what it is made of there, too
    return tensor


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """Return the submodule that holds a tensor, and the name of its attribute there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _get(module: torch.nn.Module, name: str) -> torch.Tensor:
    owner, leaf = _owner(module, name)
    tensor: torch.Tensor = getattr(owner, leaf)
    return tensor
