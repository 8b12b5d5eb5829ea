"""Partial responses: a truthful one is accepted, and nothing that differs from the request is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.pool.worker.partial_content import (
    Mismatch,
    PartialContent,
    find_mismatch,
    is_compressed,
    parse_content_range,
)

A, B = (("etag", '"a"'),), (("etag", '"b"'),)
TRUTHFUL = PartialContent(206, "bytes 10-19/100", 10, A)
WHOLE = PartialContent(200, "", 100, A)


def mismatch(response: PartialContent, **expected: Any) -> Mismatch | None:
    return find_mismatch(response, **{"start": 10, "end": 20, "object_size": 100, "validators": A, **expected})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"status": 200}, Mismatch.STATUS),
        ({"content_range": ""}, Mismatch.RANGE),
        ({"content_range": "bytes 11-19/100"}, Mismatch.RANGE),
        ({"content_range": "bytes 10-20/100"}, Mismatch.RANGE),
        ({"content_range": "bytes */100"}, Mismatch.RANGE),
        ({"content_range": "bytes 10-19/101"}, Mismatch.OBJECT_SIZE),
        ({"content_range": "bytes 10-19/*"}, None),
        ({"content_range": "Bytes 10-19/100"}, None),
        ({"validators": B}, Mismatch.VERSION),
        ({"validators": ()}, Mismatch.VERSION),
        ({"validators": B, "content_range": "bytes 10-19/101"}, Mismatch.VERSION),
        ({"length": 9}, Mismatch.LENGTH),
        ({"length": 11}, Mismatch.LENGTH),
        ({"length": None}, None),
    ],
    ids=str,
)
def test_first_difference_from_the_request_is_named(changes: dict[str, Any], expected: Mismatch | None) -> None:
    assert mismatch(TRUTHFUL._replace(**changes)) is expected


def test_version_that_is_not_known_yet_may_be_any() -> None:
    assert mismatch(TRUTHFUL._replace(validators=B), validators=()) is None
    assert mismatch(TRUTHFUL._replace(content_range="bytes 10-19/101"), object_size=None) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"length": None}, None),  # chunked, say: its bytes are counted
        ({"content_range": "bytes 0-99/100"}, None),
        ({"content_range": "bytes 0-98/100"}, Mismatch.RANGE),
        ({"validators": B}, Mismatch.VERSION),
        ({"validators": B, "length": 101}, Mismatch.VERSION),
        ({"length": 101}, Mismatch.OBJECT_SIZE),
        ({"length": 99}, Mismatch.OBJECT_SIZE),
        ({"status": 201}, Mismatch.STATUS),
    ],
    ids=str,
)
def test_whole_object_may_be_answered_with_200(changes: dict[str, Any], expected: Mismatch | None) -> None:
    assert mismatch(WHOLE._replace(**changes), start=0, end=100) is expected


def test_whole_object_in_place_of_a_range_is_a_wrong_status() -> None:
    for start, end in ((0, 99), (1, 100), (10, 20)):
        assert mismatch(WHOLE, start=start, end=end) is Mismatch.STATUS
    # Where the size is not known, the response states it.
    assert mismatch(WHOLE, start=0, end=100, object_size=None) is None
    assert mismatch(WHOLE, start=0, end=99, object_size=None) is Mismatch.STATUS
    assert mismatch(WHOLE._replace(length=None), start=0, end=100, object_size=None) is Mismatch.STATUS


ENCODINGS = ["gzip", "zstd", "br", "deflate", "GZIP", "aws-chunked,gzip", "gzip, br"]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8", "aws-chunked", "identity", "x-my-own"])
def test_stored_encoding_is_the_objects_own_affair(encoding: str) -> None:
    assert mismatch(TRUTHFUL._replace(encoding=encoding)) is None
    assert mismatch(TRUTHFUL._replace(encoding=encoding), object_size=None) is None
    assert mismatch(WHOLE._replace(encoding=encoding), start=0, end=100) is None
    # Without a length only if it is known to be stored so, or if nothing is compressed by such a word.
    chunked = TRUTHFUL._replace(encoding=encoding, length=None)
    assert mismatch(chunked, encoding=encoding) is None
    assert (mismatch(chunked) is None) is (not is_compressed(encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    "changes",
    [
        {"content_range": "bytes 10-19/40"},
        {"content_range": "bytes 10-19/*"},
        {"length": 25},
        {"length": None},
        {"status": 200, "content_range": "", "length": 40},
    ],
    ids=str,
)
def test_body_that_is_compressed_on_the_way_is_refused(encoding: str, changes: dict[str, Any]) -> None:
    response = TRUTHFUL._replace(encoding=encoding, **changes)
    whole = {"start": 0, "end": 100} if response.status == 200 else {}
    assert mismatch(response, **whole) is Mismatch.ENCODING


content_ranges = st.text(max_size=40) | st.from_regex(r"bytes 1[01]-(19|20)/(100|101|\*)", fullmatch=True)


@given(
    response=st.builds(
        PartialContent,
        status=st.sampled_from([200, 206, 416]),
        content_range=content_ranges,
        length=st.none() | st.integers(0, 200),
        validators=st.sampled_from([(), A, B]),
        encoding=st.sampled_from(["", "gzip"]),
    )
)
def test_whatever_is_accepted_states_exactly_the_bytes_requested(response: PartialContent) -> None:
    if mismatch(response) is None:
        named = parse_content_range(response.content_range)
        assert named is not None
        assert (response.status, named.start, named.end, response.validators) == (206, 10, 20, A)
        assert named.object_size in (100, None)
        assert response.length in (10, None)
        assert not response.encoding or (named.object_size, response.length) == (100, 10)


@given(start=st.integers(0, 10**17), nbytes=st.integers(1, 10**9), size=st.none() | st.integers(0, 10**17))
def test_content_range_is_parsed_to_a_half_open_range(start: int, nbytes: int, size: int | None) -> None:
    text = f"bytes {start}-{start + nbytes - 1}/{'*' if size is None else size}"
    assert parse_content_range(text) == (start, start + nbytes, size)


@pytest.mark.parametrize(
    "text", ["bytes 1-2/3 ", "items 1-2/3", "bytes -1-2/3", "bytes 1-2", "bytes \u0661-2/3", f"bytes 0-{'9' * 5000}/1"]
)
def test_content_range_of_another_form_is_none(text: str) -> None:
    assert parse_content_range(text) is None
