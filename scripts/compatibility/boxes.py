"""Loads of boxes of checkpoints, which any version of torch may have written.

  python scripts/compatibility/boxes.py FOLDER     writes a checkpoint to FOLDER/VERSION, of torch; needs no mpreader

checks.py loads boxes of all that was written there, and compares every bit.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

# First row and column, rows and columns: of rows, of columns, and a box within both.
BOXES: Final = (((300, 0), (200, None)), ((0, 200), (None, 100)), ((700, 31), (300, 300)))
ODD: Final = ("transposed", "conjugated", "requires grad")  # of which more than the rows may be received


def tensors() -> dict[str, Any]:
    """The tensors of a checkpoint, all of 1000 rows or more and 400 columns."""
    numbers = torch.arange(500_000, dtype=torch.float32).reshape(1000, 500)
    made = {
        "float32": numbers,
        "float64": numbers.double(),
        "bfloat16": numbers.bfloat16().repeat(2, 1),
        "bool": (numbers % 3 == 0).repeat(4, 1),
        "int8": (numbers % 101).to(torch.int8).repeat(5, 1),
        "complex64": torch.complex(numbers, -numbers),
        "three dimensions": numbers.reshape(1000, 500, 1),
        "transposed": numbers.t().contiguous().t(),
        "conjugated": torch.complex(numbers, -numbers).conj(),
        "requires grad": numbers.clone().requires_grad_(),
    }
    if hasattr(torch, "float8_e4m3fn"):
        made["float8_e4m3fn"] = (numbers % 13).to(torch.float8_e4m3fn).repeat(4, 1)
    return made


def write(folder: Path) -> Path:
    """Write a checkpoint, by torch alone; returns its folder."""
    own = folder / torch.__version__.partition("+")[0]
    writer = dcp.FileSystemWriter(own)
    if torch.__version__.startswith("2.2."):  # whose save needs a process group
        dcp.save_state_dict(tensors(), writer, no_dist=True)
    else:
        dcp.save(tensors(), storage_writer=writer)
    return own


class Planner(DefaultLoadPlanner):
    """Loads a box of every tensor into the same box of the target."""

    def __init__(self, offsets: Sequence[int], lengths: Sequence[int | None]) -> None:
        super().__init__()
        self._offsets, self._lengths = offsets, lengths

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[self._box(item) for item in plan.items])

    def _box(self, item: Any) -> Any:
        at = torch.Size([*self._offsets, *[0] * (len(item.lengths) - 2)])
        size = torch.Size(
            [wanted or whole for wanted, whole in zip((*self._lengths, None), item.lengths, strict=False)]
        )
        return dataclasses.replace(item, dest_offsets=at, storage_offsets=at, lengths=size)


def load_and_compare(make_reader: Any) -> None:
    """Load boxes of a checkpoint of :func:`tensors`, and compare them; of rows, no more must be received than that.

    Args:
        make_reader: Makes a storage reader of mpreader's.
    """
    saved = tensors()
    for number, (offsets, lengths) in enumerate(BOXES):
        for names in (saved.keys() - set(ODD), ODD):
            state = {name: _zeros(saved[name]) for name in sorted(names)}
            with make_reader() as reader:
                dcp.load(state, storage_reader=reader, planner=Planner(offsets, lengths))
                received = reader.stats.bytes
            needed = sum(_compare(state[name], saved[name].detach(), name, offsets, lengths) for name in state)
            if number == 0 and names is not ODD:
                assert received <= 1.05 * needed, f"{received} bytes were received for {needed}"


def _compare(
    got: torch.Tensor, wanted: torch.Tensor, name: str, offsets: Sequence[int], lengths: Sequence[int | None]
) -> int:
    """Compare a box, and that nothing else was written; returns its bytes."""
    expected = _zeros(wanted)
    box = tuple(slice(at, None if count is None else at + count) for at, count in zip(offsets, lengths, strict=False))
    expected[box] = wanted[box]
    assert _bits(got) == _bits(expected), f"{name} has other values"
    return int(wanted[box].numel() * wanted.element_size())


def _zeros(like: torch.Tensor) -> torch.Tensor:
    # Some versions of torch can't fill tensors of every type.
    raw = torch.zeros(like.numel() * like.element_size(), dtype=torch.uint8)
    return raw.view(like.dtype).reshape(like.shape)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.resolve_conj().contiguous().flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write(Path(sys.argv[1]))
