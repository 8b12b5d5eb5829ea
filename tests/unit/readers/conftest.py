"""An object whose streams are made by hand: every chunk, every end and every failure can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from types import SimpleNamespace

import pytest


class StoredObject:
    """Bytes behind ``get_object_info`` and ``get_stream``; notes each call.

    Attributes:
        data: The object.
        chunk_sizes: Sizes of the chunks of a stream, repeated as needed.
        size: What ``info`` says.
        ends_after: Bytes after which a stream ends, however much was asked for.
        fails_after: Bytes after which a stream raises ConnectionResetError.
        extra: Bytes that a stream sends after those asked for.
    """

    def __init__(self, data: bytes, chunk_sizes: Sequence[int] = (7,)) -> None:
        self.data = data
        self.chunk_sizes = chunk_sizes
        self.size = len(data)
        self.ends_after: int | None = None
        self.fails_after: int | None = None
        self.extra = b""
        self.heads = 0
        self.requests: list[tuple[int | None, int | None]] = []

    def info(self) -> SimpleNamespace:
        self.heads += 1
        return SimpleNamespace(size=self.size)

    def stream(self, start: int | None = None, end: int | None = None) -> Iterator[bytes]:
        self.requests.append((start, end))
        body = self.data[start:end]
        return self._chunks(body[: self.ends_after] if self.fails_after is None else body[: self.fails_after])

    def _chunks(self, body: bytes) -> Iterator[bytes]:
        fails, body = self.fails_after is not None, body + self.extra
        sizes, sent = cycle(self.chunk_sizes), 0
        while sent < len(body):
            size = next(sizes)
            yield body[sent : sent + size]
            sent += size
        if fails:
            raise ConnectionResetError("the stream broke")


@pytest.fixture(scope="session")
def stored() -> Callable[..., StoredObject]:
    """Makes stored objects: ``stored(data, chunk_sizes)``."""
    return StoredObject
