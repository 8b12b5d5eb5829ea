"""Conversion: the result, the size of a batch, and the thread that loads ahead; for both converters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from mpreader.config import MiB

__all__ = ["BATCH_BYTES", "Conversion", "loaded_ahead"]

BATCH_BYTES: Final = 128 * MiB
"""Largest size of a batch, of which two are held. A larger tensor is loaded in boxes; the checksum of a stored shard is
compared only if all of the shard fits into one batch."""

Request = TypeVar("Request")
Loaded = TypeVar("Loaded")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        files: URIs or paths of the files that were written. The index, or ``.metadata``, comes last.
        nbytes: Bytes of the safetensors files that were written, headers included; or, of a conversion to DCP, of the
            tensors in them.
        tensors: Number of tensors.
        left_out: Names of the items that were left out because they are not tensors.
        checked_nbytes: Bytes of the source whose checksums were compared: none of safetensors files, which have no
            checksums, and none of a shard that is too large to be loaded at once.
        is_verified: True if all files were read back and compared with what was loaded.
    """

    files: tuple[str, ...]
    nbytes: int
    tensors: int
    left_out: tuple[str, ...]
    checked_nbytes: int
    is_verified: bool


def loaded_ahead(load: Callable[[Request], Loaded], requests: Iterable[Request]) -> Generator[Loaded, None, None]:
    """Yield what ``load`` returns for each request, in order; a thread loads the next one meanwhile.

    Closing the generator waits for the load that is under way.
    """
    with ThreadPoolExecutor(1, "mpreader-convert") as thread:
        pending: Future[Loaded] | None = None
        for request in requests:
            before, pending = pending, thread.submit(load, request)
            if before is not None:
                yield before.result()
        if pending is not None:
            yield pending.result()
