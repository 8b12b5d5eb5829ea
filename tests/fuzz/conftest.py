"""Real bytes, damaged: what disks, networks and attackers make of them.

In a normal run each test tries a few examples. ``MPREADER_FUZZ_EXAMPLES=20000`` makes each of them try so many;
``scripts/fuzz`` does that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import pytest
from hypothesis import strategies as st

_MOST_MUTATIONS: Final = 4
_INTEGERS: Final = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
# What the interpreter, torch and hypothesis's own notes may take in addition; a bug takes gigabytes.
_MOST_BYTES: Final = 256 * 1024 * 1024
_MOST_BYTES_PER_EXAMPLE: Final = 16 * 1024

_EXAMPLES: Final = int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200"))


class Mutant(NamedTuple):
    """A damaged copy of ``corpus[origin]``."""

    origin: int
    data: bytes


class Mutants(Protocol):
    """Makes the strategy that damages the entries of a corpus."""

    def __call__(self, corpus: Sequence[bytes]) -> st.SearchStrategy[Mutant]: ...


class _Mutation(NamedTuple):
    kind: str
    at: int
    length: int
    other: int

    def apply(self, data: bytearray, donor: bytes) -> None:
        at, other = self.at % (len(data) + 1), self.other % (len(data) + 1)
        start = self.other % (len(donor) + 1)
        piece, given = data[at : at + self.length], donor[start : start + self.length]
        value = _INTEGERS[self.other % len(_INTEGERS)]
        width = 1 << self.length % 4
        cut, by, where = {
            "flip": (1, bytes(byte ^ 1 << self.other % 8 for byte in piece[:1]), at),
            "overwrite": (self.length, bytes([self.other % 256]) * len(piece), at),
            "insert": (0, self.other.to_bytes(4, "big") * (self.length % 8 + 1), at),
            "delete": (self.length, b"", at),
            "duplicate": (0, bytes(piece), other),
            "truncate": (len(data), b"", at),
            "splice": (len(data), donor[start:], at),
            "transplant": (self.length, given, at),
            "integer": (width, (value % 256**width).to_bytes(width, "little"), at),
            "swap": (0, b"", at),
        }[self.kind]
        data[where : where + cut] = by
        if self.kind == "swap":
            _swap(data, at, other, self.length)


_KINDS: Final = (
    *("flip", "overwrite", "insert", "delete", "duplicate", "swap", "truncate", "splice", "transplant", "integer"),
)


def _swap(data: bytearray, one: int, other: int, length: int) -> None:
    one, other = min(one, other), max(one, other)
    length = min(length, other - one, len(data) - other)
    first, second = data[one : one + length], data[other : other + length]
    data[other : other + length] = first
    data[one : one + length] = second


def _mutate(corpus: Sequence[bytes], origin: int, donor: int, mutations: Sequence[_Mutation]) -> Mutant:
    data = bytearray(corpus[origin])
    for mutation in mutations:
        mutation.apply(data, corpus[donor])
    return Mutant(origin, bytes(data))


@pytest.fixture(scope="session")
def mutants() -> Mutants:
    positions = st.integers(0, 2**20)
    lengths = st.one_of(st.integers(1, 16), st.integers(1, 2048))
    mutation = st.builds(_Mutation, st.sampled_from(_KINDS), positions, lengths, positions)
    mutations = st.lists(mutation, min_size=1, max_size=_MOST_MUTATIONS)

    def strategy(corpus: Sequence[bytes]) -> st.SearchStrategy[Mutant]:
        which = st.integers(0, len(corpus) - 1)
        return st.builds(lambda *drawn: _mutate(corpus, *drawn), which, which, mutations)

    return strategy


@pytest.fixture(autouse=True)
def _memory_stays_small() -> Iterator[None]:
    """No test may make the process grow much, not even for a moment."""
    before = _peak_bytes(reset=True)
    yield
    assert _peak_bytes() - before < _MOST_BYTES + _EXAMPLES * _MOST_BYTES_PER_EXAMPLE


def _peak_bytes(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
