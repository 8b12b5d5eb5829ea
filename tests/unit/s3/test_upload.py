"""next_part_bytes: S3's limits hold for every object."""

from __future__ import annotations

import pytest

from mpreader.config import GiB, MiB
from mpreader.s3.upload import next_part_bytes

_LARGEST_OBJECT = 5 * 1024 * GiB


@pytest.mark.parametrize("part_bytes", [5 * MiB, 8 * MiB, 100 * MiB, 5 * GiB])
def test_next_part_bytes_makes_any_object_fit_into_10000_parts(part_bytes: int) -> None:
    written, parts, size = 0, 0, part_bytes
    while written < _LARGEST_OBJECT:
        assert part_bytes <= size <= 5 * GiB
        written, parts = written + size, parts + 1
        size = next_part_bytes(size, written)
    assert parts <= 10_000


def test_next_part_bytes_keeps_the_size_while_it_is_enough() -> None:
    assert next_part_bytes(8 * MiB, 1250 * 8 * MiB) == 8 * MiB
