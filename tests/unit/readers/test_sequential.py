from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mpreader import ObjectChanged, SequentialS3Reader, ShortRead, TransportError

BODY = bytes(range(100))


def open_reader(source: Any) -> SequentialS3Reader:
    return SequentialS3Reader("bucket", "key", source.info, source.stream)


def test_sequential_reader_asks_for_nothing_before_it_must(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source)
    assert (source.requests, source.heads) == ([], 0)
    reader.prefetch()
    reader.prefetch()
    assert (source.requests, source.heads) == ([(None, None)], 0)


def test_sequential_reader_learns_the_size_from_the_end_of_the_stream(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source)
    assert reader.read() == BODY
    assert reader.seek(0, 2) == 100
    assert source.heads == 0


def test_sequential_reader_receives_no_further_than_it_is_read(stored: Callable[..., Any]) -> None:
    reader = open_reader(stored(BODY, [10]))
    reader.read(15)
    assert "received=20" in repr(reader)


@pytest.mark.parametrize("read", [lambda r: r.read(), lambda r: r.read(90), lambda r: r.readinto(bytearray(90))])
def test_sequential_stream_shorter_than_the_object_is_a_short_read(
    stored: Callable[..., Any], read: Callable[[SequentialS3Reader], object]
) -> None:
    # Unlike s3torchconnector's, which takes the end of the stream for the end of the object.
    source = stored(BODY)
    source.ends_after = 60
    reader = open_reader(source)
    reader.seek(-95, 2)
    with pytest.raises(ShortRead, match=r"0-100 of s3://bucket/key ended after 60 of 100 bytes") as caught:
        read(reader)
    assert (caught.value.bucket, caught.value.key, caught.value.range) == ("bucket", "key", (0, 100))
    assert reader.tell() == 5


def test_sequential_stream_longer_than_the_object_is_a_changed_object(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    source.size = 80
    reader = open_reader(source)
    reader.seek(-10, 2)
    with pytest.raises(ObjectChanged, match="80 bytes, but 100 came"):
        reader.read()


def test_sequential_stream_that_broke_never_passes_for_a_whole_object(stored: Callable[..., Any]) -> None:
    # Unlike s3torchconnector's: there the next read() returns what had come, as if it were all.
    source = stored(BODY)
    source.fails_after = 60
    reader = open_reader(source)
    with pytest.raises(ConnectionResetError):
        reader.read()
    with pytest.raises(TransportError, match="open a new reader"):
        reader.read()
    assert reader.read(56) == BODY[:56]  # what is known to be right is still there


def test_sequential_stream_that_can_not_be_opened_may_be_tried_again(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    refusals = [ConnectionRefusedError("not yet")]

    def stream(start: int | None = None, end: int | None = None) -> Any:
        if refusals:
            raise refusals.pop()
        return source.stream(start, end)

    reader = SequentialS3Reader("bucket", "key", source.info, stream)
    with pytest.raises(ConnectionRefusedError):
        reader.read()
    assert reader.read() == BODY


def test_sequential_read_at_the_known_end_opens_no_stream(stored: Callable[..., Any]) -> None:
    source = stored(BODY)
    reader = open_reader(source)
    reader.seek(0, 2)
    assert (reader.read(), reader.read(5), reader.readinto(bytearray(5))) == (b"", b"", 0)
    assert source.requests == []
