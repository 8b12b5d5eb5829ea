"""Partial responses: a truthful one is accepted, and nothing that differs from the request is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.pool.worker.partial_content import Mismatch, PartialContent, find_mismatch, parse_content_range

TRUTHFUL = PartialContent(206, "bytes 10-19/100", '"a"', 10)


def mismatch(response: PartialContent, etag: str = '"a"', object_size: int | None = 100) -> Mismatch | None:
    return find_mismatch(response, start=10, end=20, etag=etag, object_size=object_size)


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
        ({"etag": '"b"'}, Mismatch.VERSION),
        ({"etag": ""}, Mismatch.VERSION),
        ({"etag": '"b"', "content_range": "bytes 10-19/101"}, Mismatch.VERSION),
        ({"length": 9}, Mismatch.LENGTH),
        ({"length": 11}, Mismatch.LENGTH),
        ({"length": None}, None),
        ({"encoding": "gzip"}, Mismatch.ENCODING),
        ({"encoding": "aws-chunked"}, None),
    ],
    ids=str,
)
def test_first_difference_from_the_request_is_named(changes: dict[str, object], expected: Mismatch | None) -> None:
    assert mismatch(TRUTHFUL._replace(**changes)) is expected  # type: ignore[arg-type]


def test_version_that_is_not_known_yet_may_be_any() -> None:
    assert mismatch(TRUTHFUL._replace(etag='"b"'), etag="") is None
    assert mismatch(TRUTHFUL._replace(content_range="bytes 10-19/101"), object_size=None) is None


content_ranges = st.text(max_size=40) | st.from_regex(r"bytes 1[01]-(19|20)/(100|101|\*)", fullmatch=True)


@given(
    response=st.builds(
        PartialContent,
        status=st.sampled_from([200, 206, 416]),
        content_range=content_ranges,
        etag=st.sampled_from(["", '"a"', '"b"']),
        length=st.none() | st.integers(0, 200),
        encoding=st.sampled_from(["", "gzip"]),
    )
)
def test_whatever_is_accepted_states_exactly_the_bytes_requested(response: PartialContent) -> None:
    if mismatch(response) is None:
        named = parse_content_range(response.content_range)
        assert named is not None
        assert (response.status, named.start, named.end, response.etag) == (206, 10, 20, '"a"')
        assert named.object_size in (100, None)
        assert response.length in (10, None)


@given(start=st.integers(0, 10**17), nbytes=st.integers(1, 10**9), size=st.none() | st.integers(0, 10**17))
def test_content_range_is_parsed_to_a_half_open_range(start: int, nbytes: int, size: int | None) -> None:
    text = f"bytes {start}-{start + nbytes - 1}/{'*' if size is None else size}"
    assert parse_content_range(text) == (start, start + nbytes, size)


@pytest.mark.parametrize(
    "text", ["bytes 1-2/3 ", "items 1-2/3", "bytes -1-2/3", "bytes 1-2", "bytes \u0661-2/3", f"bytes 0-{'9' * 5000}/1"]
)
def test_content_range_of_another_form_is_none(text: str) -> None:
    assert parse_content_range(text) is None
