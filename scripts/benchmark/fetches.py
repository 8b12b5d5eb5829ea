"""Fetches, without torch: whole objects kept, whole objects streamed, scattered ranges.

The task that measure.py runs for the workloads e, f and g. libraries.py holds the contenders.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from checkpoints import BUCKET, Checkpoint, checkpoint_of
from isal import isal_zlib
from tasks import Job, WrongBytes

__all__ = ["PART_BYTES", "FetchTask", "Library", "Piece", "Take", "parts_of"]

PART_BYTES: Final = 8 * 1024 * 1024
SCATTERED: Final = 5_000
SCATTERED_BYTES: Final = 64 * 1024


class Piece(NamedTuple):
    """Bytes of an object that have arrived.

    Attributes:
        key: Key of the object.
        start: Position of the first byte in the object.
        data: The bytes, in any bytes-like object.
    """

    key: str
    start: int
    data: Any


Take = Callable[[Piece], None]


class Library(Protocol):
    """A contender: a library, and the way in which it is used."""

    def keep(self, sizes: Mapping[str, int]) -> list[Piece]:
        """Fetch whole objects, of these sizes by key, and keep all of them."""

    def stream(self, sizes: Mapping[str, int], take: Take) -> None:
        """Fetch whole objects piece by piece, and drop each piece after ``take`` was called with it.

        Several threads may call ``take`` at the same time.
        """

    def scatter(self, ranges: Mapping[str, Sequence[tuple[int, int]]]) -> list[Piece]:
        """Fetch ranges, ends exclusive; returns a piece for each."""

    def close(self) -> None:
        """End threads, processes and connections."""


class FetchTask:
    """Fetches from the files of checkpoint (a). The second run uses the client, pool or fetcher of the first."""

    def __init__(self, job: Job) -> None:
        from libraries import library_maker

        self.target_ranges: list[tuple[int, int]] = []
        self.cuts = 0
        self._make_library = library_maker(job)
        self._library: Library | None = None
        self._bucket_folder = job.data / BUCKET
        self._sizes = Checkpoint(self._bucket_folder / checkpoint_of(job.workload)).files
        self._ranges = _scattered(self._sizes)
        self._workload = job.workload
        self._checking = job.checking
        self._pieces: list[Piece] = []  # kept ones, until check() or the next run
        # Key, start, size and CRC-32 of each piece that was streamed or checked; appended to by several threads.
        self._taken: list[tuple[str, int, int, int]] = []

    def prepare(self) -> None:
        self._pieces, self._taken = [], []

    def run(self) -> None:
        library = self._library = self._library or self._make_library()  # in the first run: it is part of its time
        if self._workload == "e":
            self._pieces = library.keep(self._sizes)
        elif self._workload == "f":
            library.stream(self._sizes, self._take)
        else:
            self._pieces = library.scatter(self._ranges)

    def check(self) -> None:
        for piece in self._pieces:
            self._take(piece)
        wanted = SCATTERED * SCATTERED_BYTES if self._workload == "g" else sum(self._sizes.values())
        if sum(size for _, _, size, _ in self._taken) != wanted:
            raise WrongBytes("not as many bytes as were asked for")
        for key, start, size, crc in self._taken:
            with (self._bucket_folder / key).open("rb") as file:
                if isal_zlib.crc32(os.pread(file.fileno(), size, start)) != crc:
                    raise WrongBytes(f"{key} from {start}")

    def close(self) -> None:
        self.prepare()
        if self._library is not None:
            self._library.close()

    def _take(self, piece: Piece) -> None:
        crc = isal_zlib.crc32(piece.data) if self._checking else 0
        self._taken.append((piece.key, piece.start, len(piece.data), crc))


def _scattered(sizes: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """Ranges that don't overlap, in no order."""
    chooser = random.Random(1)
    step = SCATTERED_BYTES
    # A place of each object is left out at its end, so that all ranges have the same size.
    places = [(key, start) for key, size in sizes.items() for start in range(0, size - step, step)]
    ranges: dict[str, list[tuple[int, int]]] = {key: [] for key in sizes}
    for key, start in chooser.sample(places, SCATTERED):
        ranges[key].append((start, start + step))
    return ranges


def parts_of(sizes: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Objects cut into parts: (key, start, end)."""
    for key, size in sizes.items():
        for start in range(0, size, PART_BYTES):
            yield key, start, min(start + PART_BYTES, size)
