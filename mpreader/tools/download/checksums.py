"""Checksums of a stream of bytes, several in one pass, by the names of S3's algorithms.

A download computes two at most: the one that is reported, and the one that S3 has stored.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any, Final

__all__ = ["COMPUTABLE", "Digests"]

COMPUTABLE: Final = ("sha256", "sha1", "crc32", "md5")
"""Algorithms that both S3 and the standard library know, in the order of preference."""


class Digests:
    """Several checksums of one stream of bytes.

    Args:
        algorithms: Those of ``COMPUTABLE`` that are wanted.
    """

    def __init__(self, algorithms: Iterable[str]) -> None:
        self._by_algorithm = {name: _Crc32() if name == "crc32" else _hash(name) for name in algorithms}

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the stream."""
        for digest in self._by_algorithm.values():
            digest.update(data)

    def hex(self, algorithm: str) -> str:
        """Hexadecimal digits of one of the checksums, of all bytes so far."""
        digits: str = self._by_algorithm[algorithm].hexdigest()
        return digits


class _Crc32:
    """zlib's CRC-32 with the methods of hashlib's objects."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


def _hash(algorithm: str) -> Any:
    # A machine in FIPS mode refuses MD5 unless it is told that no secret depends on it.
    return hashlib.new(algorithm, usedforsecurity=False)
