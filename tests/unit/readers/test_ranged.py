from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from mpreader import RangedS3Reader, ShortRead
from mpreader.readers.ranged import DEFAULT_BUFFER_SIZE

BODY = bytes(range(100))


def open_reader(source: Any, buffer_size: int | None = None) -> RangedS3Reader:
    return RangedS3Reader("bucket", "key", source.info, source.stream, buffer_size=buffer_size)


def test_small_reads_share_a_request(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source, 30)
    reader.seek(10)
    assert [reader.read(5), reader.read(20), reader.read(10)] == [BODY[10:15], BODY[15:35], BODY[35:45]]
    assert source.requests == [(10, 40), (40, 70)]


def test_large_reads_request_exactly_what_the_buffer_lacks(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source, 30)
    reader.read(5)
    assert reader.read(60) == BODY[5:65]
    assert source.requests == [(0, 30), (30, 65)]


def test_buffer_of_size_zero_requests_exactly_what_is_read(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source, 0)
    assert [reader.read(1), reader.read(2), reader.read(0)] == [BODY[:1], BODY[1:3], b""]
    assert source.requests == [(0, 1), (1, 3)]


def test_buffer_is_8_mib_by_default_and_never_past_the_object(stored: Callable[..., Any]) -> None:
    source = stored(bytes(DEFAULT_BUFFER_SIZE + 10), [1 << 20])
    reader = open_reader(source)
    reader.read(1)
    reader.seek(-5, 2)
    reader.read(1)
    assert source.requests == [(0, 8 << 20), ((8 << 20) + 5, (8 << 20) + 10)]


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_buffer_size_of_a_wrong_type_is_refused(stored: Callable[..., Any], value: Any) -> None:
    with pytest.raises(TypeError, match="buffer_size must be int or None"):
        open_reader(stored(BODY), value)


def test_negative_buffer_size_is_refused(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, where it means "no buffer".
    with pytest.raises(ValueError, match="buffer_size must be non-negative, got -1"):
        open_reader(stored(BODY), -1)


@pytest.mark.parametrize("buffer_size", [0, 50, None])
@pytest.mark.parametrize("read", [lambda r: r.read(40), lambda r: r.readinto(bytearray(40))])
def test_ranged_stream_that_ends_early_is_a_short_read(
    stored: Callable[..., Any], buffer_size: int | None, read: Callable[[RangedS3Reader], object]
) -> None:
    # Unlike s3torchconnector's, whose readinto() reports 40 bytes, whatever came.
    source = stored(BODY)
    source.ends_after = 20
    reader = open_reader(source, buffer_size)
    reader.seek(10)
    with pytest.raises(ShortRead, match=r"of s3://bucket/key ended after 20 of") as caught:
        read(reader)
    assert caught.value.range is not None
    assert caught.value.range[0] == 10
    assert reader.tell() == 10
    source.ends_after = None
    assert reader.read(40) == BODY[10:50]


def test_ranged_request_that_broke_leaves_nothing_of_it_in_the_buffer(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's, where the new bytes stay in the buffer under the old offsets.
    source = stored(BODY)
    reader = open_reader(source, 30)
    reader.read(1)
    source.fails_after = 20
    reader.seek(50)
    with pytest.raises(ConnectionResetError):
        reader.read(1)
    source.fails_after = None
    reader.seek(1)
    assert reader.read(20) == BODY[1:21]


@pytest.mark.parametrize("buffer_size", [0, 50])
def test_bytes_beyond_those_requested_are_dropped(stored: Callable[..., Any], buffer_size: int) -> None:
    source = stored(BODY)
    source.extra = b"beyond"
    reader = open_reader(source, buffer_size)
    assert [reader.read(30), reader.read()] == [BODY[:30], BODY[30:]]


def test_reader_pickles_with_its_position_and_without_its_buffer(stored: Callable[..., Any]) -> None:
    reader = open_reader(stored(BODY), 30)
    reader.read(5)
    copy = pickle.loads(pickle.dumps(reader))
    assert [copy.tell(), copy.read(10), reader.read(10)] == [5, BODY[5:15], BODY[5:15]]
    assert copy._get_stream.__self__.requests == [(0, 30), (5, 35)]
