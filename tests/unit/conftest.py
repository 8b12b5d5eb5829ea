"""Guard of the unit tests: none starts a process or a server, so that they take seconds and run anywhere.

What needs a process or a server is in ``tests/integration/``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

_REFUSED = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "socket.bind"})
_is_unit_test = False


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if _is_unit_test and event in _REFUSED:
        raise RuntimeError(f"{event} in a unit test: it belongs in tests/integration")


sys.addaudithook(_refuse)  # for ever, therefore the flag


@pytest.fixture(autouse=True)
def _no_process_and_no_server() -> Iterator[None]:
    global _is_unit_test
    _is_unit_test = True
    yield
    _is_unit_test = False


class CutItem:
    """A record cut into separately allocated pieces; refuses, loudly, to be read outside of its bounds."""

    def __init__(self, record: bytes, cuts: Sequence[int] = ()) -> None:
        borders = sorted({0, len(record), *(cut % (len(record) + 1) for cut in cuts)})
        self._parts = [(a, bytearray(record[a:b])) for a, b in pairwise(borders)]
        self.size = len(record)

    def pieces(self, start: int, end: int) -> Iterator[memoryview]:
        assert 0 <= start <= end <= self.size, (start, end, self.size)
        for at, part in self._parts:
            low, high = max(start, at), min(end, at + len(part))
            if low < high:
                yield memoryview(part)[low - at : high - at]

    def view(self, start: int, end: int) -> memoryview:
        return memoryview(bytearray(b"".join(self.pieces(start, end))))


@pytest.fixture(scope="session")
def cut_item() -> type[CutItem]:
    return CutItem
