"""Sample state: resembles the state that a training run saves, and can be compared with a loaded one bit by bit.

``mpreader demo`` saves it to a server and loads it back. The demo must not import torch, so all that it needs of torch
is here. This module must not start servers or measure times: that is the demo's task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

__all__ = ["State", "blank_copy", "differing", "load_state", "make_state", "save_state", "tensor_sizes"]

State = dict[str, dict[str, Any]]
"""Groups by name: ``"model"`` and ``"odd"`` hold tensors by name, ``"items"`` holds values that are no tensors."""

_MB: Final = 1_000_000  # bytes
_TENSOR_GROUPS: Final = ("model", "odd")
_ITEMS: Final = {"step": 12_000, "lr": 3e-4, "name": "demo", "betas": [0.9, 0.95], "schedule": ("cosine", 100)}


def make_state(size_mb: int) -> State:
    """Make a state.

    Args:
        size_mb: Size of the weights, in MB (1e6 bytes), rounded down to whole layers but at least one layer. They are
            of dtype bfloat16.
    """
    # Small layers for a small state, so that it has many tensors, too.
    width = 1024 if size_mb >= 100 else 128
    layer: dict[str, tuple[int, ...]] = dict.fromkeys("qkvo", (width, width))
    layer |= {"up": (4 * width, width), "down": (width, 4 * width), "norm": (width,)}
    layer_bytes = sum(2 * torch.Size(shape).numel() for shape in layer.values())
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{number}.{name}.weight": _random_bits(shape, generator)
        for number in range(max(1, size_mb * _MB // layer_bytes))
        for name, shape in layer.items()
    }
    with torch.device("cpu"):  # the default device may be one without memory
        return {"model": weights, "odd": _odd_tensors(), "items": dict(_ITEMS)}


def _odd_tensors() -> dict[str, torch.Tensor]:
    """Returns tensors of the layouts, sizes and values that a loader is most likely to get wrong."""
    ramp = torch.linspace(0, 1, 99, dtype=torch.float32)
    return {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 7, dtype=torch.float32),
        "mask": torch.arange(1001) % 3 == 0,
        "ids": torch.arange(-500, 500),
        "complex": torch.complex(ramp, 1 - ramp),
        "transposed": torch.arange(6000, dtype=torch.float32).reshape(60, 100).t(),
        "not_a_number": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float32),
    }


def _random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # Any bit pattern may come, also one of a NaN: that is fine, since bits are compared and not numbers.
    bits = torch.empty(shape, dtype=torch.int16, device="cpu")
    return bits.random_(-(1 << 15), 1 << 15, generator=generator).view(torch.bfloat16)


def tensor_sizes(state: State) -> list[int]:
    """Returns the number of bytes of each tensor of a state."""
    return [tensor.nbytes for group in _TENSOR_GROUPS for tensor in state[group].values()]


def save_state(state: State, writer: StorageWriter) -> None:
    """Save a state from this process alone; no process group is needed."""
    with _errors_unwrapped():
        save(state, storage_writer=writer, no_dist=True)


def load_state(target: State, reader: StorageReader) -> None:
    """Load into the tensors of ``target``, which have the right shapes, in this process alone."""
    with _errors_unwrapped():
        load(target, storage_reader=reader, no_dist=True)


@contextlib.contextmanager
def _errors_unwrapped() -> Iterator[None]:
    """Raise the error itself in place of the ``CheckpointException`` that torch wraps around it.

    torch wraps even the KeyboardInterrupt of a Ctrl-C, as the failure of a rank, and its wrapper is a BaseException,
    which the handlers of errors in the commands would not catch.
    """
    try:
        yield
    except CheckpointException as failure:
        [(error, _)] = failure.failures.values()  # exactly one, since there is one rank
        # An interrupted torch.save may raise an error of its own, with the KeyboardInterrupt as its context.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        raise cause or error from None


def blank_copy(state: State) -> State:
    """Returns a state of the same names, shapes and types, with other contents, to be loaded into.

    Its tensors are filled with ones. So the pages of their memory exist before a load is timed, and a value that the
    load leaves out does not equal the saved one by chance.
    """
    target: State = {
        group: {name: torch.full_like(tensor, 1) for name, tensor in state[group].items()} for group in _TENSOR_GROUPS
    }
    target["items"] = {name: type(value)() for name, value in state["items"].items()}
    return target


def differing(state: State, loaded: State) -> list[str]:
    """Returns the names of the values, such as ``"odd.mask"``, that differ between the states in at least one bit."""
    tensors = [(group, name) for group in _TENSOR_GROUPS for name in state[group]]
    names = [f"{group}.{name}" for group, name in tensors if not _same_bits(state[group][name], loaded[group][name])]
    return names + [f"items.{name}" for name, value in state["items"].items() if loaded["items"][name] != value]


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    # Compared as bytes: as numbers, a NaN would differ from itself, and 0.0 would equal -0.0.
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
