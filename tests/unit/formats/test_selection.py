from __future__ import annotations

import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.errors import PlanError
from mpreader.formats.selection import (
    GAPS,
    Box,
    Gaps,
    Run,
    Selection,
    box_of,
    box_runs,
    contiguous_order,
    index_in_memory,
    select_box,
    stored_runs,
)

MiB = 1024 * 1024
FRONT = (600, 900)  # places where the payload may begin


@st.composite
def tensors_and_boxes(draw: st.DrawFn) -> tuple[list[int], Box]:
    size = draw(st.lists(st.integers(1, 7), max_size=4))
    box = []
    for whole in size:
        offset = draw(st.integers(0, whole - 1))
        box.append((offset, draw(st.integers(1, whole - offset))))
    return size, tuple(box)


def needed_bytes(size: list[int], box: Box, itemsize: int) -> set[int]:
    """The bytes of a box by numpy's indexing."""
    elements = np.arange(math.prod(size)).reshape(size)
    chosen = elements[tuple(slice(offset, offset + length) for offset, length in box)]
    return {int(element) * itemsize + byte for element in chosen.ravel() for byte in range(itemsize)}


@given(tensors_and_boxes(), st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_runs_hold_the_bytes_of_the_box_and_no_gap_that_is_too_large(
    drawn: tuple[list[int], Box], itemsize: int, max_gap: int
) -> None:
    size, box = drawn
    runs = box_runs(size, box, itemsize, max_gap_bytes=max_gap)
    assert runs is not None
    needed = sorted(needed_bytes(size, box, itemsize))
    # The runs of a brute-force model: what is needed, cut at the gaps that are larger.
    cuts = [at for at, (one, other) in enumerate(pairwise(needed), start=1) if other - one - 1 > max_gap]
    borders = [0, *cuts, len(needed)]
    assert runs == [Run(needed[first], needed[last - 1] + 1) for first, last in pairwise(borders)]


@given(tensors_and_boxes(), st.permutations(range(4)), st.integers(0, 5))
def test_runs_of_a_tensor_in_another_order_of_memory(
    drawn: tuple[list[int], Box], permutation: list[int], storage_offset: int
) -> None:
    size, box = drawn
    order = [dim for dim in permutation if dim < len(size)]
    stored = np.empty([size[dim] for dim in order], np.float32)
    tensor = stored.transpose(np.argsort(order)) if order else stored
    stride = tuple(nbytes // 4 for nbytes in tensor.strides)
    runs = stored_runs(tuple(size), stride, storage_offset, 4, box, 2 * MiB)
    assert runs is not None
    indices = product(*(range(offset, offset + length) for offset, length in box))
    elements = [sum(index * step for index, step in zip(at, stride, strict=True)) for at in indices]
    # All of it is within the largest gap, so it is one run.
    assert runs == [Run(4 * (storage_offset + min(elements)), 4 * (storage_offset + max(elements) + 1))]


@given(tensors_and_boxes())
def test_index_in_memory_tells_of_boxes_without_gaps(drawn: tuple[list[int], Box]) -> None:
    size, box = drawn
    needed = sorted(needed_bytes(size, box, 1))
    is_contiguous = needed[-1] - needed[0] + 1 == len(needed)
    assert index_in_memory(size, box) == (needed[0] if is_contiguous else None)


@pytest.mark.parametrize(
    ("size", "stride"), [((4, 3), (6, 2)), ((4, 3), (0, 1)), ((4,), (2,)), ((2, 2), (1, 1))], ids=str
)
def test_tensor_with_gaps_or_repeated_elements_is_needed_whole(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    assert contiguous_order(size, stride) is None
    assert stored_runs(size, stride, 0, 4, tuple((0, 1) for _ in size), 2 * MiB) is None


def test_empty_box_has_no_runs() -> None:
    assert box_runs([4, 5], ((0, 0), (0, 5)), 4, max_gap_bytes=0) == []


def test_box_of_a_longer_length_takes_all_of_the_dimension() -> None:
    assert box_of([4, 5, 6], [1, 2], [2, 9]) == ((1, 2), (0, 5), (0, 6))
    with pytest.raises(PlanError, match="outside of a tensor"):
        box_of([4], [3], [2])


@pytest.mark.parametrize("gaps", GAPS)
def test_rows_are_selected_exactly_but_for_the_front(gaps: Gaps) -> None:
    nbytes = 8 * MiB
    record = nbytes + 1600
    for row in range(4):
        selection = select_box((1024, 2048), ((256 * row, 256), (0, 2048)), 4, record, FRONT, gaps)
        start = 2 * MiB * row
        assert selection == Selection(900, (Run(600 + start, 900 + start + 2 * MiB),), gaps.within_box)


@pytest.mark.parametrize("gaps", GAPS)
def test_columns_of_short_rows_are_one_run_and_of_long_ones_many(gaps: Gaps) -> None:
    short = select_box((1024, 2048), ((0, 1024), (512, 512)), 4, 8 * MiB + 1600, FRONT, gaps)
    assert short is None  # nearly everything is received, so all of it may be
    long = select_box((5, 4 * MiB), ((0, 5), (MiB, MiB)), 1, 20 * MiB + 1600, FRONT, gaps)
    assert long is not None
    assert [run.size for run in long.runs] == [MiB + 300] * 5
    assert 3 * MiB > gaps.within_box  # that is, the gap


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("nbytes", [1, 1000, 64 * 1024, 10 * MiB])
def test_record_of_which_little_could_be_left_out_is_taken_whole(nbytes: int, gaps: Gaps) -> None:
    left_out = max(gaps.between_records, (nbytes + 1600) // 32) - 2000
    wanted = max(1, nbytes - max(0, left_out))
    assert select_box((nbytes,), ((0, wanted),), 1, nbytes + 1600, FRONT, gaps) is None


def test_shape_that_does_not_fit_the_record_is_no_selection() -> None:
    gaps = GAPS[0]
    assert select_box((100 * MiB,), ((99 * MiB, 100),), 1, 50 * MiB, FRONT, gaps) is None


def test_forged_shape_makes_no_endless_list_of_runs() -> None:
    gaps = GAPS[0]
    assert box_runs([2**40, 2**30], ((0, 2**40), (0, 1)), 1, max_gap_bytes=0) is None
    assert select_box((2**40, 2**30), ((0, 2**40), (0, 1)), 1, 2**71, FRONT, gaps) is None


def test_gap_between_records_is_never_larger_than_that_within_a_box() -> None:
    assert all(gaps.between_records <= gaps.within_box for gaps in GAPS)
