"""Random programs on the two general readers and on s3torchconnector's, with io.BytesIO as the judge."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3torchconnector.s3reader import RangedS3Reader as TheirRanged
from s3torchconnector.s3reader import SequentialS3Reader as TheirSequential

from mpreader import RangedS3Reader, S3Reader, SequentialS3Reader

Step = tuple[str, tuple[Any, ...]]

sizes = st.one_of(st.none(), st.integers(-2, 90))
steps = st.one_of(
    st.tuples(st.just("read"), st.tuples(sizes)),
    st.tuples(st.just("readinto"), st.tuples(st.integers(0, 90))),
    st.tuples(st.just("seek"), st.tuples(st.integers(-20, 80))),
    st.tuples(st.just("seek"), st.tuples(st.integers(-80, 80), st.sampled_from([0, 1, 2, 3]))),
    st.tuples(st.just("tell"), st.just(())),
)
programs = st.lists(steps, max_size=12)
bodies = st.binary(max_size=70)
chunkings = st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any)
buffer_sizes = st.one_of(st.none(), st.integers(0, 40))


class Judge(io.BytesIO):
    """BytesIO, but a seek stops at the end and refuses every negative target: the promise of the readers."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        before, size = self.tell(), len(self.getbuffer())
        target = {0: 0, 1: before, 2: size}[whence] + offset if whence in (0, 1, 2) else -1
        if target < 0:
            raise ValueError
        return super().seek(min(target, size))


def outcome(file: Any, step: Step) -> object:
    """Result of a step and the state after it, or the type of the exception that it raises."""
    name, arguments = step
    try:
        if name == "readinto":
            buffer = bytearray(arguments[0])
            return file.readinto(buffer), bytes(buffer), file.tell()
        return getattr(file, name)(*arguments), file.tell()
    except ValueError as error:
        return type(error), file.tell()


def check(file: Any, body: bytes, program: list[Step]) -> None:
    judge = Judge(body)
    assert [outcome(file, step) for step in program] == [outcome(judge, step) for step in program]


@given(bodies, chunkings, programs)
def test_sequential_reader_does_what_bytesio_does(
    stored: Callable[..., Any], body: bytes, chunks: list[int], program: list[Step]
) -> None:
    for kind in (SequentialS3Reader, TheirSequential):
        source = stored(body, chunks)
        check(kind("bucket", "key", source.info, source.stream), body, program)
        assert len(source.requests) <= 1
        assert source.heads <= 1


@given(bodies, chunkings, buffer_sizes, programs)
def test_ranged_reader_does_what_bytesio_does(
    stored: Callable[..., Any], body: bytes, chunks: list[int], buffer_size: int | None, program: list[Step]
) -> None:
    for kind in (RangedS3Reader, TheirRanged):
        source = stored(body, chunks)
        check(kind("bucket", "key", source.info, source.stream, buffer_size=buffer_size), body, program)
        assert source.heads <= 1


@given(bodies, chunkings, buffer_sizes, programs)
def test_ranged_reader_makes_the_requests_of_s3torchconnector_or_fewer(
    stored: Callable[..., Any], body: bytes, chunks: list[int], buffer_size: int | None, program: list[Step]
) -> None:
    counts = []
    for kind in (RangedS3Reader, TheirRanged):
        source = stored(body, chunks)
        reader = kind("bucket", "key", source.info, source.stream, buffer_size=buffer_size)
        for step in program:
            outcome(reader, step)
        counts.append(len(source.requests))
    assert counts[0] <= counts[1]


@pytest.fixture(params=[SequentialS3Reader, RangedS3Reader])
def reader(request: pytest.FixtureRequest, stored: Callable[..., Any]) -> S3Reader:
    source = stored(b"first line\nsecond line\nrest", [4])
    made: S3Reader = request.param("bucket", "a/key", source.info, source.stream)
    return made


def test_reader_reads_lines_and_text(reader: S3Reader) -> None:
    assert reader.readline() == b"first line\n"
    binary: Any = reader  # typeshed wants a name from what is wrapped; io does not
    assert list(io.TextIOWrapper(binary)) == ["second line\n", "rest"]


def test_reader_fills_any_writable_buffer(reader: S3Reader) -> None:
    numbers = memoryview(bytearray(8)).cast("i")
    assert reader.readinto(numbers) == 8
    assert bytes(numbers) == b"first li"
    assert reader.readinto(memoryview(bytearray()).cast("B")) == 0


@pytest.mark.parametrize("argument", [b"read-only", memoryview(b"read-only"), "text", 5, None])
def test_readinto_refuses_what_can_not_be_written_to(reader: S3Reader, argument: Any) -> None:
    with pytest.raises(TypeError):
        reader.readinto(argument)


@pytest.mark.parametrize("argument", [1.0, "1"])
def test_read_and_seek_refuse_what_is_no_whole_number(reader: S3Reader, argument: Any) -> None:
    for call in (lambda: reader.read(argument), lambda: reader.seek(argument), lambda: reader.seek(0, argument)):
        with pytest.raises(TypeError):
            call()
    assert reader.tell() == 0


def test_closed_reader_refuses_to_read_and_to_move(reader: S3Reader) -> None:
    # Unlike s3torchconnector's, where read() after close() opens a new stream.
    with reader:
        reader.read(3)
    reader.close()
    assert reader.closed
    for call in (reader.read, reader.tell, lambda: reader.seek(0), lambda: reader.readinto(bytearray(1))):
        with pytest.raises(ValueError, match=r"closed reader of s3://bucket/a/key"):
            call()


def test_reader_shows_its_object_and_its_state(reader: S3Reader) -> None:
    assert (reader.bucket, reader.key) == ("bucket", "a/key")
    assert (reader.readable(), reader.seekable(), reader.writable()) == (True, True, False)
    reader.read(3)
    assert f"{type(reader).__name__} s3://bucket/a/key open position=3" in repr(reader)
    reader.close()
    assert "closed" in repr(reader)


@pytest.mark.parametrize(("bucket", "key"), [("", "key"), (None, "key"), ("bucket", ""), ("bucket", None)])
@pytest.mark.parametrize("kind", [SequentialS3Reader, RangedS3Reader])
def test_reader_needs_bucket_and_key(stored: Callable[..., Any], kind: Any, bucket: Any, key: Any) -> None:
    source = stored(b"")
    with pytest.raises(ValueError, match="must not be empty"):
        kind(bucket, key, source.info, source.stream)
