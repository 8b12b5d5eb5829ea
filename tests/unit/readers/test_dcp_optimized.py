from __future__ import annotations

import io
import itertools
import tracemalloc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from s3torchconnector.s3reader import DCPOptimizedS3Reader as TheirReader
from s3torchconnector.s3reader.dcp_optimized import ItemRange as TheirRange
from torch.distributed.checkpoint.utils import _create_file_view

from mpreader import DCPOptimizedS3Reader, ItemRange, PlanError, ShortRead

BODY = bytes(i * 7 % 251 for i in range(300))
Span = tuple[int, int]

spans = st.tuples(st.integers(0, 250), st.integers(0, 50)).map(lambda span: (span[0], span[0] + span[1]))
chunkings = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)
gaps = st.one_of(st.integers(0, 60), st.just(float("inf")))


@st.composite
def sorted_layouts(draw: st.DrawFn) -> list[Span]:
    """Items as DCP writes them: in order, with gaps between some, none empty."""
    edges = draw(st.lists(st.integers(0, 300), min_size=2, max_size=12, unique=True).map(sorted))
    touching = list(itertools.pairwise(edges))
    return draw(st.lists(st.sampled_from(touching), min_size=1, unique=True).map(sorted))


def open_reader(source: Any, layout: list[Span], gap: float = 0) -> DCPOptimizedS3Reader:
    ranges = [ItemRange(start, end) for start, end in layout]
    return DCPOptimizedS3Reader("bucket", "key", ranges, source.info, source.stream, gap)


def read_item(reader: Any, start: int, end: int) -> bytes:
    """Read an item about as torch.load reads it: magic number, end, then the whole, in pieces."""
    view: Any = _create_file_view(reader, start, end - start)
    magic = view.read(4)
    view.seek(max(0, end - start - 9))
    tail = view.read()
    view.seek(0)
    half, whole = bytearray((end - start) // 2), bytearray()
    view.readinto(half)
    whole += half
    whole += view.read(-1)
    assert (magic, tail) == (whole[:4], whole[-9:])
    return bytes(whole)


@given(sorted_layouts(), chunkings, gaps)
def test_items_are_read_as_s3torchconnector_reads_them(
    stored: Callable[..., Any], layout: list[Span], chunks: list[int], gap: float
) -> None:
    ours, theirs = stored(BODY, chunks), stored(BODY, chunks)
    reader = open_reader(ours, layout, gap)
    their_ranges = [TheirRange(start, end) for start, end in layout]
    their_reader = TheirReader("bucket", "key", their_ranges, theirs.info, theirs.stream, gap)
    for start, end in layout:
        assert read_item(reader, start, end) == read_item(their_reader, start, end) == BODY[start:end]
    assert ours.requests == theirs.requests
    assert ours.heads == 0


@given(st.lists(spans, min_size=1, max_size=8), chunkings, gaps)
def test_items_may_repeat_overlap_be_empty_and_come_in_any_order(
    stored: Callable[..., Any], layout: list[Span], chunks: list[int], gap: float
) -> None:
    # Unlike s3torchconnector's, which refuses all of these but the empty ones.
    source = stored(BODY, chunks)
    reader = open_reader(source, layout, gap)
    for start, end in layout:
        assert read_item(reader, start, end) == BODY[start:end]
    assert len(source.requests) <= sum(end > start for start, end in layout)


steps = st.one_of(
    st.tuples(st.just("read"), st.tuples(st.one_of(st.none(), st.integers(-2, 60)))),
    st.tuples(st.just("readinto"), st.tuples(st.integers(0, 60))),
    st.tuples(st.just("seek"), st.tuples(st.integers(-60, 60), st.sampled_from([0, 1, 2, 3]))),
)


def outcome(file: Any, name: str, arguments: tuple[Any, ...]) -> object:
    if name != "readinto":
        return getattr(file, name)(*arguments), file.tell()
    buffer = bytearray(arguments[0])
    return file.readinto(buffer), bytes(buffer), file.tell()


@given(sorted_layouts(), st.data())
def test_any_access_does_what_bytesio_does_or_is_a_value_error_and_stays(
    stored: Callable[..., Any], layout: list[Span], data: st.DataObject
) -> None:
    reader, judge = open_reader(stored(BODY), layout, 60), io.BytesIO(BODY)
    to_item = st.tuples(st.just("seek"), st.tuples(st.sampled_from([start for start, _ in layout])))
    for name, arguments in data.draw(st.lists(st.one_of(steps, to_item), max_size=12)):
        before = reader.tell()
        try:
            ours = outcome(reader, name, arguments)
        except ValueError:
            assert reader.tell() == before
        else:
            assert ours == outcome(judge, name, arguments)


@pytest.mark.parametrize("read", [lambda r, size: r.read(size), lambda r, size: r.readinto(bytearray(size))])
@pytest.mark.parametrize("kind", [DCPOptimizedS3Reader, TheirReader])
@pytest.mark.parametrize(
    ("layout", "reads"),
    [
        pytest.param([(10, 20)], [(0, 5)], id="before the first item"),
        pytest.param([(10, 20)], [(15, 21)], id="past the end of an item"),
        pytest.param([(10, 20), (20, 30)], [(20, 25)], id="the second item first"),
        pytest.param([(10, 20), (20, 30), (30, 40)], [(10, 20), (30, 40)], id="an item left out"),
        pytest.param([(10, 20), (20, 30)], [(10, 20), (18, 22)], id="across two items"),
        pytest.param([(10, 20), (30, 40)], [(10, 20), (22, 24)], id="in a gap"),
        pytest.param([(10, 20), (20, 30)], [(10, 20), (20, 30), (10, 20)], id="back to an item that is gone"),
        pytest.param([(10, 20)], [(10, 20), (20, 21)], id="after the last item"),
    ],
)
def test_access_out_of_order_is_a_value_error_that_says_what_to_do(
    stored: Callable[..., Any], kind: Any, layout: list[Span], reads: list[Span], read: Callable[[Any, int], object]
) -> None:
    source = stored(BODY)
    their_ranges = [TheirRange(start, end) for start, end in layout]  # ours takes them too
    reader = kind("bucket", "key", their_ranges, source.info, source.stream)
    for start, end in reads[:-1]:
        reader.seek(start)
        assert reader.read(end - start) == BODY[start:end]
    start, end = reads[-1]
    reader.seek(start)
    with pytest.raises(ValueError, match=r"S3ReaderConstructor\.default\(\)"):
        read(reader, end - start)


@pytest.mark.parametrize("kind", [DCPOptimizedS3Reader, TheirReader])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda r: r.read(), ValueError),
        (lambda r: r.read(-1), ValueError),
        (lambda r: r.read("1"), TypeError),
        (lambda r: r.readinto(b"read-only"), (TypeError, AssertionError)),
        (lambda r: r.seek(0, 2), ValueError),
        (lambda r: r.seek(0, 3), ValueError),
        (lambda r: r.seek(0.0), TypeError),
        (lambda r: r.seek(-1), ValueError),
    ],
)
def test_wrong_arguments_raise_as_in_s3torchconnector(
    stored: Callable[..., Any], kind: Any, call: Callable[[Any], object], error: type[Exception]
) -> None:
    source = stored(BODY)
    with pytest.raises(error):
        call(kind("bucket", "key", [TheirRange(0, 10)], source.info, source.stream))


# Theirs is closed by its finalizer although it was not made, which fails; Python 3.13 and newer report that.
@pytest.mark.filterwarnings("ignore:.*DCPOptimizedS3Reader:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [DCPOptimizedS3Reader, TheirReader])
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"bucket": ""}, ValueError),
        ({"key": ""}, ValueError),
        ({"item_ranges": []}, ValueError),
        ({"item_ranges": [TheirRange(-1, 5)]}, ValueError),
        ({"item_ranges": [TheirRange(8, 5)]}, ValueError),
        ({"max_gap_size": -1}, ValueError),
        ({"max_gap_size": "1"}, TypeError),
    ],
)
def test_wrong_construction_raises_as_in_s3torchconnector(
    stored: Callable[..., Any], kind: Any, changed: dict[str, Any], error: type[Exception]
) -> None:
    source = stored(BODY)
    right = {"bucket": "b", "key": "k", "item_ranges": [TheirRange(0, 5)], "max_gap_size": 0}
    with pytest.raises(error):
        kind(get_object_info=source.info, get_stream=source.stream, **{**right, **changed})


def test_malformed_range_is_a_plan_error(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    ranges: Any = [SimpleNamespace(start=5, end=None)]
    with pytest.raises(PlanError, match="start=5, end=None"):
        DCPOptimizedS3Reader("bucket", "key", ranges, source.info, source.stream)


def test_readinto_refuses_a_read_only_buffer_with_a_type_error(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, which asserts it.
    with pytest.raises(TypeError, match="writable"):
        open_reader(stored(BODY), [(0, 10)]).readinto(memoryview(b"read-only"))


def test_refused_read_leaves_the_order_of_the_items_alone(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, which has moved on to the next item when it raises.
    reader = open_reader(stored(BODY), [(0, 10), (10, 20), (20, 30)])
    reader.read(10)
    reader.seek(20)
    with pytest.raises(ValueError, match="neither in the current item"):
        reader.read(5)
    reader.seek(10)
    assert reader.read(10) == BODY[10:20]


def test_negative_seek_does_not_move_the_position(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, which raises and moves.
    reader = open_reader(stored(BODY), [(0, 10)])
    reader.read(3)
    with pytest.raises(ValueError, match="negative position -5"):
        reader.seek(-5)
    assert reader.read(3) == BODY[3:6]


def test_empty_reads_are_empty_wherever_they_are(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source, [(10, 20)])
    assert (reader.read(0), reader.readinto(bytearray()), source.requests) == (b"", 0, [])


def test_object_with_only_empty_items_opens_and_reads_nothing(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, which refuses to open it.
    source = stored(BODY)
    reader = open_reader(source, [(5, 5), (300, 300)])
    for start in (5, 300):
        view: Any = _create_file_view(reader, start, 0)
        assert (view.read(-1), view.read(4), view.readinto(bytearray(4))) == (b"", b"", 0)
    assert source.requests == []
    with pytest.raises(ValueError, match="neither in the current item"):
        reader.read(1)


@pytest.mark.parametrize(
    ("gap", "requests"),
    [
        (0, [(0, 20), (25, 30), (60, 70)]),
        (5, [(0, 30), (60, 70)]),
        (4.9, [(0, 20), (25, 30), (60, 70)]),
        (30, [(0, 70)]),
    ],
)
def test_items_share_a_stream_over_gaps_up_to_the_largest(
    stored: Callable[..., Any], gap: float, requests: list[Span]
) -> None:
    source = stored(BODY)
    layout = [(0, 10), (10, 20), (25, 30), (60, 70)]
    reader = open_reader(source, layout, gap)
    assert [read_item(reader, *span) for span in layout] == [BODY[start:end] for start, end in layout]
    assert source.requests == requests


def test_repeated_item_is_requested_once(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    layout = [(0, 50), (0, 50), (20, 30), (50, 90), (50, 90)]
    reader = open_reader(source, layout)
    for span in layout:
        read_item(reader, *span)
    assert source.requests == [(0, 90)]
    assert "items=2/2" in repr(reader)


@pytest.mark.parametrize("ends_after", [0, 15, 25])  # in the first item, in the gap, in the second item
def test_stream_that_ends_early_is_a_short_read_and_may_be_tried_again(
    stored: Callable[..., Any], ends_after: int
) -> None:
    source = stored(BODY, [4])
    source.ends_after = ends_after
    reader = open_reader(source, [(10, 20), (30, 40)], 60)
    with pytest.raises(ShortRead, match=rf"10-40 of s3://bucket/key ended after {ends_after} of 30") as caught:
        [read_item(reader, *span) for span in [(10, 20), (30, 40)]]
    assert (caught.value.bucket, caught.value.key, caught.value.range) == ("bucket", "key", (10, 40))
    source.ends_after = None
    rest = [(10, 20), (30, 40)] if ends_after < 10 else [(30, 40)]
    assert [read_item(reader, *span) for span in rest] == [BODY[start:end] for start, end in rest]


def test_stream_that_broke_is_not_read_on(stored: Callable[..., Any]) -> None:
    source = stored(BODY, [4])
    source.fails_after = 15
    reader = open_reader(source, [(0, 10), (10, 20)])
    reader.read(10)
    with pytest.raises(ConnectionResetError):
        reader.read(10)
    source.fails_after = None
    assert reader.read(10) == BODY[10:20]
    assert source.requests == [(0, 20), (10, 20)]


def test_closed_reader_refuses_to_read_and_to_move(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, which reads on.
    reader = open_reader(stored(BODY), [(0, 10)])
    with reader:
        reader.read(2)
    reader.close()
    for call in (lambda: reader.read(1), lambda: reader.readinto(bytearray(1)), lambda: reader.seek(0), reader.tell):
        with pytest.raises(ValueError, match="closed reader"):
            call()


def test_memory_is_bounded_by_one_item_and_its_chunks() -> None:
    mib = 1 << 20
    ranges = [ItemRange(i * mib, (i + 4) * mib) for i in range(0, 64, 4)]
    reader = DCPOptimizedS3Reader(
        "bucket", "key", ranges, lambda: SimpleNamespace(size=64 * mib), lambda *_: (bytes(mib) for _ in range(64))
    )
    target = bytearray(4 * mib)
    tracemalloc.start()
    try:
        assert [reader.readinto(target) for _ in ranges] == [4 * mib] * 16
        assert tracemalloc.get_traced_memory()[1] < 7 * mib
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chunk", [1, 63, 64, 1000, 1 << 20])
def test_saved_tensors_load_through_torch(stored: Callable[..., Any], chunk: int) -> None:
    tensors = [torch.arange(n, dtype=torch.int64) for n in (0, 1, 17, 5000)] + [torch.rand(3, 40).to(torch.bfloat16)]
    file, layout = io.BytesIO(), []
    for tensor in tensors:
        start = file.tell() + 13  # a gap before each
        file.seek(start)
        torch.save(tensor, file)
        file.seek(0, 2)
        layout.append((start, file.tell()))
    reader = open_reader(stored(file.getvalue(), [chunk]), layout, 13)
    for tensor, (start, end) in zip(tensors, layout, strict=True):
        view: Any = _create_file_view(reader, start, end - start)
        assert torch.equal(torch.load(view, weights_only=True), tensor)
