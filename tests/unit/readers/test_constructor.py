from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from s3torchconnector.s3reader import S3ReaderConstructor as TheirConstructor
from s3torchconnector.s3reader.protocol import DCPS3ReaderConstructorProtocol as TheirProtocol

from mpreader import (
    DCPOptimizedConstructor,
    DCPOptimizedS3Reader,
    ItemRange,
    PlanError,
    RangedS3Reader,
    S3ReaderConstructor,
    SequentialS3Reader,
)
from mpreader.readers.protocols import DCPS3ReaderConstructorProtocol, S3ReaderConstructorProtocol


@dataclass(frozen=True)
class PlanItem:
    storage_index: str


@dataclass(frozen=True)
class Stored:
    relative_path: Any
    offset: Any
    length: Any


def told(*items: Stored, base_path: Any = "s3://bucket/ckpt") -> DCPOptimizedConstructor:
    """A constructor that was told a plan that reads these items in this order."""
    constructor = S3ReaderConstructor.dcp_optimized()
    storage = {str(index): item for index, item in enumerate(items)}
    constructor.set_item_ranges_by_file([PlanItem(index) for index in storage], storage, base_path)
    return constructor


@pytest.mark.parametrize(
    ("constructor", "kind", "name"),
    [
        (S3ReaderConstructor.sequential(), SequentialS3Reader, "sequential"),
        (S3ReaderConstructor.default(), SequentialS3Reader, "sequential"),
        (S3ReaderConstructor.range_based(), RangedS3Reader, "range_based"),
        (S3ReaderConstructor.range_based(0), RangedS3Reader, "range_based"),
        (told(Stored("a", 0, 1)), DCPOptimizedS3Reader, "dcp_optimized"),
    ],
)
def test_constructor_makes_its_kind_also_after_pickling(
    stored: Callable[..., Any], constructor: Any, kind: type, name: str
) -> None:
    source = stored(b"body")
    for made_by in (constructor, pickle.loads(pickle.dumps(constructor))):
        assert S3ReaderConstructor.get_reader_type_string(made_by) == name
        assert isinstance(made_by, S3ReaderConstructorProtocol)
        reader = made_by(bucket="bucket", key="ckpt/a", get_object_info=source.info, get_stream=source.stream)
        assert type(reader) is kind
        assert reader.read(1) == b"b"


def test_reader_type_of_none_is_that_of_the_default_and_of_strangers_unknown() -> None:
    assert S3ReaderConstructor.get_reader_type_string(None) == "sequential"
    strangers: list[Any] = [TheirConstructor.sequential(), TheirConstructor.dcp_optimized(), lambda: None, object()]
    assert {S3ReaderConstructor.get_reader_type_string(stranger) for stranger in strangers} == {"unknown"}


def test_buffer_size_reaches_the_reader_and_is_checked_at_once(stored: Callable[..., Any]) -> None:
    source = stored(bytes(100))
    S3ReaderConstructor.range_based(10)("bucket", "key", source.info, source.stream).read(1)
    assert source.requests == [(0, 10)]
    with pytest.raises(ValueError, match="buffer_size"):
        S3ReaderConstructor.range_based(-1)


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_max_gap_is_checked_at_once(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_gap_size"):
        S3ReaderConstructor.dcp_optimized(value)


@pytest.mark.parametrize(("gap", "requests"), [(4, [(0, 10), (15, 20)]), (5, [(0, 20)])])
def test_max_gap_reaches_the_reader(stored: Callable[..., Any], gap: int, requests: list[tuple[int, int]]) -> None:
    constructor, source = S3ReaderConstructor.dcp_optimized(gap), stored(bytes(100))
    constructor.set_item_ranges_by_file(
        [PlanItem("x"), PlanItem("y")], {"x": Stored("a", 0, 10), "y": Stored("a", 15, 5)}, "s3://bucket/ckpt"
    )
    reader = constructor("bucket", "ckpt/a", source.info, source.stream)
    reader.read(10)
    reader.seek(15)
    reader.read(5)
    assert source.requests == requests


def test_range_constructors_satisfy_the_protocols_of_both_libraries() -> None:
    protocols: list[Any] = [TheirProtocol, DCPS3ReaderConstructorProtocol]
    for constructor in (S3ReaderConstructor.dcp_optimized(), TheirConstructor.dcp_optimized()):
        assert [isinstance(constructor, protocol) for protocol in protocols] == [True, True]
    for generic in (S3ReaderConstructor.sequential(), S3ReaderConstructor.range_based(), S3ReaderConstructor.default()):
        assert [isinstance(generic, protocol) for protocol in protocols] == [False, False]


def test_ranges_are_kept_by_file_in_reading_order() -> None:
    constructor = told(Stored("b", 9, 3), Stored("a", 0, 5), Stored("b", 0, 9), Stored("b", 9, 3), Stored("c", 7, 0))
    assert list(constructor._item_ranges_by_file.items()) == [
        ("s3://bucket/ckpt/b", [ItemRange(9, 12), ItemRange(0, 9), ItemRange(9, 12)]),
        ("s3://bucket/ckpt/a", [ItemRange(0, 5)]),
        ("s3://bucket/ckpt/c", [ItemRange(7, 7)]),
    ]
    assert "files=3 items=5" in repr(constructor)


def test_base_path_may_be_path_like() -> None:
    class Location(os.PathLike[str]):
        def __fspath__(self) -> str:
            return "s3://bucket/x"

    assert list(told(Stored("a", 0, 1), base_path=Location())._item_ranges_by_file) == ["s3://bucket/x/a"]


@pytest.mark.parametrize("key", ["ckpt/.metadata", "ckpt/__0.metadata", ".metadata"])
def test_metadata_gets_a_sequential_reader_before_any_plan(stored: Callable[..., Any], key: str) -> None:
    source = stored(b"pickle")
    reader = S3ReaderConstructor.dcp_optimized()("bucket", key, source.info, source.stream)
    assert type(reader) is SequentialS3Reader
    assert reader.read() == b"pickle"


def test_file_without_ranges_is_a_value_error_that_says_what_to_do(stored: Callable[..., Any]) -> None:
    source = stored(b"")
    with pytest.raises(
        ValueError, match=r"no ranges are known for s3://bucket/ckpt/b: .*prepare_local_plan.*default\(\)"
    ):
        told(Stored("a", 0, 1))("bucket", "ckpt/b", source.info, source.stream)


def test_file_with_only_empty_items_opens(stored: Callable[..., Any]) -> None:
    source = stored(b"")
    reader = told(Stored("a", 0, 0))("bucket", "ckpt/a", source.info, source.stream)
    assert (reader.read(0), source.requests) == (b"", [])


def test_second_plan_replaces_the_first_and_an_empty_one_clears() -> None:
    constructor = told(Stored("a", 0, 1))
    constructor.set_item_ranges_by_file([PlanItem("x")], {"x": Stored("b", 0, 1)}, "s3://bucket/ckpt")
    assert list(constructor._item_ranges_by_file) == ["s3://bucket/ckpt/b"]
    constructor.set_item_ranges_by_file([], {}, "s3://bucket/ckpt")
    assert constructor._item_ranges_by_file == {}


def test_plan_without_storage_data_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="storage_data must not be empty"):
        S3ReaderConstructor.dcp_optimized().set_item_ranges_by_file([PlanItem("x")], {}, "s3://bucket/ckpt")


@pytest.mark.parametrize("path", ["", "/etc/passwd", "..", "../other", "a/../../b", "a/..", None, 5, b"a"])
def test_path_that_leaves_the_checkpoint_is_refused(path: Any) -> None:
    with pytest.raises(PlanError, match="outside of the checkpoint"):
        told(Stored("a", 0, 1), Stored(path, 0, 1))


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 5), (5, -1), (-5, 5), (None, 1), (0, "1"), (0.0, 1), (0, float("nan"))]
)
def test_impossible_offset_or_length_is_refused(offset: Any, length: Any) -> None:
    with pytest.raises(PlanError, match=r"item of 'a' an impossible place"):
        told(Stored("a", offset, length))


def test_refused_plan_leaves_no_half_of_it() -> None:
    constructor = told(Stored("a", 0, 1))
    with pytest.raises(PlanError):
        constructor.set_item_ranges_by_file(
            [PlanItem("x"), PlanItem("y")], {"x": Stored("b", 0, 1), "y": Stored("../c", 0, 1)}, "s3://bucket/ckpt"
        )
    assert list(constructor._item_ranges_by_file) == ["s3://bucket/ckpt/a"]
