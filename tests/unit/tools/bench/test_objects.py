from __future__ import annotations

import pytest

from mpreader.tools.bench.objects import SourceObject, passes


@pytest.mark.parametrize(("nbytes", "count"), [(1, 1), (350, 1), (351, 2), (1000, 3)])
def test_passes_hold_as_many_bytes_as_asked_for(nbytes: int, count: int) -> None:
    objects = [SourceObject("a", 250), SourceObject("b", 100)]
    done = list(passes(objects, nbytes, 64))
    sizes = {item.source: item.nbytes for item in objects}
    ranges = [(name, start, end) for one in done for name, pairs in one.items() for start, end in pairs]
    assert len(done) == count
    assert sum(end - start for _, start, end in ranges) == nbytes
    assert all(0 < end - start <= 64 and end <= sizes[name] for name, start, end in ranges)
    assert all(pairs == sorted(set(pairs)) for one in done for pairs in one.values())
