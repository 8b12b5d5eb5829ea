"""Comparison of tensors bit by bit, whatever their types."""

from __future__ import annotations

import torch

__all__ = ["assert_same", "bits"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor; a view of it if that is contiguous."""
    # A contiguous tensor of one element may have any strides, of which view() takes only some.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name
