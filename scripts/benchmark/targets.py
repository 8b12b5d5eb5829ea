"""Targets of a load: tensors in memory that was written to before (touched), or never (fresh)."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
from tree import resident_bytes

__all__ = ["Targets"]

# As malloc does, large tensors have mappings of their own, and small ones share one. They are not left to malloc, since
# it reuses memory that was touched before.
_OWN_MAPPING_BYTES: Final = 128 * 1024


class Targets:
    """bf16 tensors in private anonymous mappings.

    Args:
        shapes: Their shapes, by name.
        fresh: True: :meth:`renew` makes untouched tensors. False: it fills the same ones again.
        shared: True: all are the same tensor, for checkpoints that are larger than memory.

    Attributes:
        tensors: The targets by name; empty before the first :meth:`renew`.
        ranges: Address and size of each mapping.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, fresh: bool, shared: bool = False) -> None:
        self._shapes = shapes
        self._fresh = fresh
        self._shared = shared
        self.tensors: dict[str, torch.Tensor] = {}
        self.ranges: list[tuple[int, int]] = []

    def renew(self) -> None:
        """Prepare the targets for a load, so that nothing in them is right by chance."""
        if self._fresh or not self.tensors:
            self.tensors.clear()  # unmaps them before new ones are made, so that memory holds them once
            self.tensors = self._make()
            if self._shared:
                self.tensors = dict.fromkeys(self._shapes, *self.tensors.values())
        if not self._fresh:
            for tensor in self.tensors.values():
                tensor.fill_(1)
        elif resident_bytes("self", self.ranges):  # the measurement would be of something else
            raise RuntimeError("fresh targets have been touched")

    def _make(self) -> dict[str, torch.Tensor]:
        self.ranges = []
        tensors = {}
        for names in itertools.islice(self._mappings(), 1 if self._shared else None):
            sizes = [2 * math.prod(self._shapes[name]) for name in names]
            memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.ranges.append((ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory)))
            start = 0
            for name, size in zip(names, sizes, strict=True):
                flat = torch.frombuffer(memory, dtype=torch.bfloat16, count=size // 2, offset=start)
                tensors[name] = flat.view(list(self._shapes[name]))
                start += size
        return tensors

    def _mappings(self) -> Iterator[list[str]]:
        small = []
        for name, shape in self._shapes.items():
            if 2 * math.prod(shape) < _OWN_MAPPING_BYTES:
                small.append(name)
            else:
                yield [name]
        if small:
            yield small
