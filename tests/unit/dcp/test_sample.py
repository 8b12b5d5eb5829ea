"""Sample state: a comparison with a loaded one notices every wrong bit, and an interrupted save says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mpreader.dcp.sample import differing, make_state, save_state


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


class _Failing(FileSystemWriter):
    """Writer that fails."""

    error: BaseException

    def write_data(self, *_: Any) -> Any:
        try:
            raise self.error
        finally:
            if isinstance(self.error, KeyboardInterrupt):
                raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save says when it is interrupted


@pytest.mark.row("Ctrl-C")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")], ids=lambda error: type(error).__name__)
def test_save_that_fails_or_is_interrupted_says_so_itself(tmp_path: Path, error: BaseException) -> None:
    writer = _Failing(tmp_path)
    writer.error = error
    with pytest.raises(type(error)) as caught:
        save_state({"model": {"weight": torch.ones(3)}, "odd": {}, "items": {}}, writer)
    assert caught.value is error
