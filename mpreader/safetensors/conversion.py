"""Parts that both converters use: the result, the size of a batch, and the thread that loads ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

from mpreader.config import MiB

__all__ = ["BATCH_BYTES", "Conversion", "cut", "loaded_ahead"]

# Two batches are held. A larger tensor is loaded in boxes; the checksum of a stored shard is compared only if it fits.
BATCH_BYTES: Final = 128 * MiB
_BLOCK_BYTES: Final = MiB  # of what is read back

Request = TypeVar("Request")
Loaded = TypeVar("Loaded")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Attributes:
        files: URIs or paths of the files that were written; an index, or ``.metadata``, comes last.
        nbytes: Bytes that were converted: those of the safetensors files, without their index.
        tensors: Number of tensors.
        left_out: Names of the items that were left out because they are no tensors.
        checked_nbytes: Bytes of the source's records whose checksums were compared. safetensors files have none, and
            those of a shard that is too large to be loaded at once can't be.
        is_verified: True if all files were read back and compared with what was loaded.
    """

    files: tuple[str, ...]
    nbytes: int
    tensors: int
    left_out: tuple[str, ...]
    checked_nbytes: int
    is_verified: bool


def loaded_ahead(load: Callable[[Request], Loaded], requests: Iterable[Request]) -> Generator[Loaded, None, None]:
    """Yield what ``load`` returns for each request; the next one is loaded meanwhile, by a thread.

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


def cut(start: int, end: int) -> list[tuple[int, int]]:
    """Return the blocks of a range that is read back, none if it is empty."""
    return [(at, min(at + _BLOCK_BYTES, end)) for at in range(start, end, _BLOCK_BYTES)]
