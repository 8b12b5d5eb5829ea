"""Prefault: has the kernel give new tensors their memory while their bytes are still under way.

The kernel gives memory page by page, at the first write to each page. For a load into new tensors that is more work
than to copy the bytes, and the copying thread would do all of it. Asked for many pages at once, the kernel needs a
fifth less time, and another thread can ask.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Prefault"]

log = logging.getLogger(__name__)

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, of Linux 5.14; Python's mmap module does not have it
_STEP_BYTES: Final = 1024 * 1024  # asked for at one time: the end of a load waits for no more
_LEAST_BYTES: Final = 1024 * 1024  # smaller tensors lie in memory that the C library has had before


class Prefault:
    """Thread that prefaults tensors one after the other, and ends with the ``with`` block.

    It never fails: what it can't do, the copying thread does.

    Args:
        tensors: Tensors that are about to be overwritten as a whole; what is in them is not changed here.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._extents = [
            (tensor.data_ptr(), tensor.nbytes)
            for tensor in tensors
            if type(tensor) is torch.Tensor
            and tensor.is_cpu
            and tensor.is_contiguous()
            and tensor.nbytes >= _LEAST_BYTES
        ]
        self._is_over = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._extents:
            thread = threading.Thread(target=self._run, name="mpreader-prefault", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # a limit of threads
                log.debug("new tensors are not prefaulted: %s", error)
            else:
                self._thread = thread
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        if self._thread is not None:
            self._thread.join()  # the tensors may be freed afterwards

    def _run(self) -> None:
        try:
            madvise = ctypes.CDLL(None, use_errno=True).madvise
        except (OSError, AttributeError):
            return
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address, nbytes in self._extents:
            # Only pages that belong to the tensor alone.
            start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            for at in range(start, end, _STEP_BYTES):
                if self._is_over or madvise(at, min(_STEP_BYTES, end - at), _POPULATE_WRITE):
                    return  # an older kernel, a sandbox that refuses it, or no memory left
