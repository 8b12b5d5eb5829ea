"""Sample state: a comparison with a loaded one notices every wrong bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpreader.dcp.sample import differing, make_state


def _flip(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).view(-1)[1] ^= 1


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda state: None, []),
        (lambda state: _flip(state["model"]["layers.0.q.weight"]), ["model.layers.0.q.weight"]),
        (lambda state: state["odd"]["not_a_number"][2].abs_(), ["odd.not_a_number"]),  # -0.0 == 0.0
        (lambda state: state["odd"].update(empty=torch.empty(0, 8)), ["odd.empty"]),
        (lambda state: state["items"].update(step=0), ["items.step"]),
    ],
)
def test_differing_names_what_is_not_the_same(spoil: Callable[[dict[str, Any]], None], names: list[str]) -> None:
    state = make_state(1)
    loaded = copy.deepcopy(state)
    spoil(loaded)
    assert differing(state, loaded) == names


def test_make_state_has_the_size_asked_for() -> None:
    for size_mb in (2, 30):
        size = sum(tensor.nbytes for tensor in make_state(size_mb)["model"].values())
        assert 0.7 * size_mb < size / 1e6 <= size_mb
