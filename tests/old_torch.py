"""Plugin for torch before 2.7: its ``save`` and ``load`` of checkpoints know no ``no_dist``, which the tests give.

Without a process group they do by themselves what it asks for.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any


def _without_no_dist(module: Any, name: str) -> Any:
    function = getattr(module, name)

    @functools.wraps(function)
    def call(*arguments: Any, no_dist: bool = True, **options: Any) -> Any:
        return function(*arguments, **options)

    return call


def _adapt() -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

    for module, name in ((state_dict_saver, "save"), (state_dict_loader, "load")):
        function = _without_no_dist(module, name)
        setattr(module, name, function)
        setattr(dcp, name, function)


def _is_old() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return (int(major), int(minor)) < (2, 7)


if _is_old():  # before any test imports them
    _adapt()
