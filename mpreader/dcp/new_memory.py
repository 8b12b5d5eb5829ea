"""New memory: torch writes to it where deterministic algorithms are asked for, and can't for every type.

Whoever makes tensors that are overwritten as a whole turns it off for that time. Used by the tensor decoder and by the
states that a load fills.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.utils.deterministic

__all__ = ["unfilled_memory"]

# A setting of the whole process: of two threads that change it, the second would restore what the first has set.
_LOCK: Final = threading.RLock()


@contextlib.contextmanager
def unfilled_memory() -> Iterator[None]:
    """New tensors are not filled in its body; nothing is changed where they are not anyway."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    setting: Any = torch.utils.deterministic
    with _LOCK:
        before = setting.fill_uninitialized_memory
        setting.fill_uninitialized_memory = False
        try:
            yield
        finally:
            setting.fill_uninitialized_memory = before
