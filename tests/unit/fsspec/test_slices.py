"""Slices of files in memory: what a slice of bytes is, each of one version, and errors where they belong."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader import ObjectMissing, S3ClientConfig, ShortRead
from mpreader.fsspec.slices import SliceReader
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.sources.versions import PinnedSource

if TYPE_CHECKING:
    from typing_extensions import Self

FILES = {"bucket/a": bytes(range(100)), "bucket/b": b"content of b", "bucket/empty": b"", "http://host/c": b"c" * 9}


class Stored:
    """A file in memory. See :class:`mpreader.pool.source.Source`."""

    bucket, key, version, max_attempts = "bucket", "key", None, 1

    def __init__(self, uri: str, store: Store) -> None:
        self.uri = uri
        self._store = store

    def open(self) -> ObjectVersion:
        self._store.opened.append(self.uri)
        if self.uri not in self._store.contents:
            raise ObjectMissing(self.uri)
        return ObjectVersion(len(self._store.contents[self.uri]), '"etag"')

    def route(self) -> Route:
        raise AssertionError("only workers need it")


class Store:
    """Files in place of servers and workers: makes sources, and fetches by copying.

    Attributes:
        contents: Content of each object, by URI.
        breaks: URIs of objects that can be opened, but not read.
        opened: URIs of objects whose version was asked for.
        fetches: Paths of each fetch.
        closed: Number of fetchers that were closed.
    """

    def __init__(self) -> None:
        self.contents = {path if "://" in path else f"s3://{path}": content for path, content in FILES.items()}
        self.breaks: set[str] = set()
        self.opened: list[str] = []
        self.fetches: list[list[str]] = []
        self.closed = 0

    def fetcher(self, _: object, __: object, files: Mapping[str, PinnedSource]) -> _Fetcher:
        return _Fetcher(self, files)


class _Fetcher:
    def __init__(self, store: Store, files: Mapping[str, PinnedSource]) -> None:
        self._store = store
        self._files = files

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.closed += 1

    def fetch_many(
        self,
        ranges: Mapping[str, Sequence[tuple[int, int]]],
        out: Mapping[str, Sequence[memoryview]],
        max_gap_size: float,
    ) -> None:
        self._store.fetches.append([*ranges])
        for path in ranges:
            uri = self._files[path].uri
            if uri in self._store.breaks:
                raise ShortRead(uri)
            for (start, end), view in zip(ranges[path], out[path], strict=True):
                assert 0 <= start <= end <= self._files[path].version.size
                view[:] = self._store.contents[uri][start:end]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr("mpreader.fsspec.slices.SharedPoolFetcher", store.fetcher)
    monkeypatch.setattr("mpreader.fetch.sources.Sources.source", lambda _, uri: Stored(uri, store))
    return store


@pytest.fixture
def reader(store: Store) -> SliceReader:
    return SliceReader(S3ClientConfig(), None)


bounds = st.one_of(st.none(), st.integers(-120, 120))


@given(wanted=st.lists(st.tuples(st.sampled_from([*FILES]), st.builds(slice, bounds, bounds)), max_size=8))
def test_slices_are_those_of_bytes_and_come_by_one_fetch(
    reader: SliceReader, store: Store, wanted: list[tuple[str, slice]]
) -> None:
    by_path: dict[str, dict[int, slice]] = {}
    for number, (path, limits) in enumerate(wanted):
        by_path.setdefault(path, {})[number] = limits
    store.fetches.clear()
    contents = reader.read_current(by_path, 0)
    assert contents == {number: FILES[path][limits] for number, (path, limits) in enumerate(wanted)}
    assert store.fetches == [[*by_path]]


def test_slices_are_of_the_version_whose_size_was_asked_for(reader: SliceReader, store: Store) -> None:
    file = reader.current("bucket/b")
    assert file.version == ObjectVersion(12, '"etag"')
    store.contents["s3://bucket/b"] += b", longer now"
    assert reader.read({"bucket/b": file}, {"bucket/b": {0: slice(-4, None)}}, 0) == {0: b"of b"}
    assert store.opened == ["s3://bucket/b"]


def test_version_that_is_known_is_not_asked_for(reader: SliceReader, store: Store) -> None:
    file = reader.at_version("bucket/a", ObjectVersion(10, '"older"'))
    assert reader.read({"bucket/a": file}, {"bucket/a": {7: slice(None)}}, 0) == {7: bytes(range(10))}
    assert store.opened == []


def test_bucket_is_a_directory(reader: SliceReader, store: Store) -> None:
    for use in (reader.current, lambda path: reader.at_version(path, ObjectVersion(1, ""))):
        with pytest.raises(IsADirectoryError, match="bucket"):
            use("bucket/")
    assert store.opened == []


WANTED = {
    "bucket/a": {0: slice(0, 3), 1: slice(-1, None)},
    "bucket": {2: slice(None)},
    "bucket/missing": {3: slice(None), 4: slice(1, 2)},
    "bucket/b": {5: slice(0, 7)},
}


def test_errors_take_the_place_of_what_could_not_be_read(reader: SliceReader, store: Store) -> None:
    contents = reader.try_read_current(WANTED, 0)
    assert {number: contents[number] for number in (0, 1, 5)} == {0: b"\0\1\2", 1: b"c", 5: b"content"}
    assert [type(contents[number]) for number in (2, 3, 4)] == [IsADirectoryError, ObjectMissing, ObjectMissing]
    assert store.fetches == [["bucket/a", "bucket/b"]]


def test_file_that_breaks_takes_no_other_along(reader: SliceReader, store: Store) -> None:
    store.breaks.add("s3://bucket/a")
    contents = reader.try_read_current(WANTED, 0)
    assert [type(contents[number]) for number in (0, 1)] == [ShortRead, ShortRead]
    assert contents[5] == b"content"
    assert store.fetches == [["bucket/a", "bucket/b"], ["bucket/a"], ["bucket/b"]]
    assert store.closed == 3
    assert sorted(store.opened) == ["s3://bucket/a", "s3://bucket/b", "s3://bucket/missing"], "once for each"
    error: Any = contents[0]
    assert error.__traceback__ is None, "whoever keeps it would keep the memory of the read"


def test_first_error_in_the_order_of_paths_is_raised_before_anything_is_read(reader: SliceReader, store: Store) -> None:
    with pytest.raises(IsADirectoryError):
        reader.read_current(WANTED, 0)
    with pytest.raises(ObjectMissing):
        reader.read_current({path: WANTED[path] for path in reversed(WANTED)}, 0)
    assert store.fetches == []


def test_nothing_is_reported_when_the_remains_of_a_failed_read_are_collected(
    reader: SliceReader, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda report: reported.append(report.exc_value))
    store.breaks.add("s3://bucket/b")
    try:
        reader.read_current({"bucket/a": {0: slice(None)}, "bucket/b": {1: slice(None)}}, 0)
    except ShortRead as error:
        circle: Any = error  # frames, views of the buffers and the error itself hold each other
        circle.itself = error
        del circle
    else:
        pytest.fail("the file could be read")
    gc.collect()
    assert not reported


def test_slices_take_no_more_memory_than_their_bytes(reader: SliceReader, store: Store) -> None:
    store.contents["s3://bucket/large"] = bytes(8 << 20)
    tracemalloc.start()
    try:
        contents = reader.read_current({"bucket/large": {0: slice(None)}}, 0)
        assert len(contents[0]) == 8 << 20
        assert tracemalloc.get_traced_memory()[1] < 9 << 20
    finally:
        tracemalloc.stop()
