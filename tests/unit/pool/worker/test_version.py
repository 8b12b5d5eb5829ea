"""Versions: whatever a server says of the version that it sends is compared, and nothing else is."""

from __future__ import annotations

import pickle
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.pool.worker.version import (
    ObjectVersion,
    Validators,
    find_change,
    find_difference,
    is_strong,
    merged,
    validators_of,
)

JANUARY, FEBRUARY = "Thu, 01 Jan 2026 00:00:00 GMT", "Sun, 01 Feb 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    "name",
    [
        "ETag",
        "x-amz-version-id",
        "x-amz-checksum-crc32",
        "x-amz-checksum-crc64nvme",
        "x-amz-checksum-sha256",
        "X-Goog-Generation",
        "x-ms-blob-content-md5",
        "x-ms-version-id",
        "x-oss-hash-crc64ecma",
        "x-oss-version-id",
        "x-cos-hash-crc64ecma",
        "x-cos-version-id",
        "x-obs-version-id",
        "x-bz-content-sha1",
        "x-bz-file-id",
        "X-Checksum-Sha256",
    ],
)
def test_every_validator_that_changes_is_a_change(name: str) -> None:
    old, new = (validators_of({"Content-Length": "5", name: value}) for value in ("one", "two"))
    difference = find_difference(old, new)
    assert difference is not None
    assert difference.is_change
    assert (difference.name, difference.expected, difference.found) == (name.lower(), "one", "two")
    assert find_difference(old, old) is None


@pytest.mark.parametrize(
    "name",
    [
        "Content-MD5",
        "Content-Digest",
        "Content-Length",
        "Content-Range",
        "Date",
        "x-amz-request-id",
        "x-amz-id-2",
        "x-amz-checksum-type",
        "x-amz-checksum-mode",
        "x-amz-meta-version-id",
        "x-goog-metageneration",
        "x-ms-version",
        "Age",
    ],
)
def test_header_of_a_single_answer_is_no_validator(name: str) -> None:
    assert validators_of({name: "one"}) == ()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ('W/"1"', 'W/"1"'),
        ('"1"', 'W/"1"'),
        ('W/"1"', '"1"'),
        ('w/"1"', '"1"'),
        ("1", '"1"'),
        ('""', '""'),
    ],
)
def test_etags_are_compared_weakly(ours: str, theirs: str) -> None:
    assert find_difference((("etag", ours),), (("etag", theirs),)) is None


@pytest.mark.parametrize(("ours", "theirs"), [('"1"', '"2"'), ('W/"1"', 'W/"2"'), ('"1"', 'W/"2"'), ('"1"', '"1 "')])
def test_etags_of_two_versions_differ(ours: str, theirs: str) -> None:
    difference = find_difference((("etag", ours),), (("etag", theirs),))
    assert str(difference) == f"the answer is for ETag {theirs}, not {ours}"


def test_difference_is_printable_whatever_a_server_sends() -> None:
    difference = find_difference((("etag", '"1"'),), (("etag", '"\x1b[2J\x00"'),))
    assert str(difference) == 'the answer is for ETag "?[2J?", not "1"'


def test_moments_are_compared_whatever_their_form() -> None:
    same = ("Thursday, 01-Jan-26 00:00:00 GMT", "Thu, 1 Jan 2026 00:00:00 +0000", "Thu, 01 Jan 2026 01:00:00 +0100")
    for form in same:
        assert find_difference((("last-modified", JANUARY),), (("last-modified", form),)) is None
    for other in (FEBRUARY, "yesterday", "0"):
        assert find_difference((("last-modified", JANUARY),), (("last-modified", other),)) is not None
    assert find_difference((("last-modified", "now"),), (("last-modified", "then"),)) is not None


def test_lists_of_digests_are_compared_one_by_one() -> None:
    both = validators_of([("x-goog-hash", "crc32c=AAAAAA==,md5=BBBBBB==")])
    assert find_difference(both, validators_of([("x-goog-hash", "md5=BBBBBB==, crc32c=AAAAAA==")])) is None
    assert find_difference(both, validators_of([("x-goog-hash", "md5=BBBBBB==")])) is None
    assert find_change(both, validators_of([("x-goog-hash", "md5=BBBBBC==")])) is not None


def test_etag_that_is_missing_proves_nothing_and_is_no_change() -> None:
    ours = validators_of({"ETag": '"1"', "Last-Modified": JANUARY})
    missing = find_difference(ours, validators_of({"Last-Modified": JANUARY}))
    assert missing is not None
    assert not missing.is_change
    assert str(missing) == 'the answer is for ETag (none), not "1"'
    other = find_difference(ours, validators_of({"Last-Modified": FEBRUARY}))
    assert other is not None
    assert other.is_change, "another time shows a change, though the ETag is missing"


def test_answer_that_shares_no_validator_proves_nothing() -> None:
    ours = validators_of({"Last-Modified": JANUARY})
    for headers in ({}, {"ETag": '"1"'}, {"x-amz-version-id": "1"}):
        difference = find_difference(ours, validators_of(headers))
        assert difference is not None
        assert not difference.is_change
    assert find_difference((), validators_of({"ETag": '"1"'})) is None


@pytest.mark.parametrize(
    ("etag", "expected"),
    [('"1"', True), ('""', True), ('W/"1"', False), ("1", False), ("", False), ('"a b"', False), ('"a\r\nb"', False)],
)
def test_only_a_strong_etag_may_be_a_condition(etag: str, expected: bool) -> None:
    assert is_strong(etag) is expected


def test_version_keeps_what_it_knew_and_learns_the_rest() -> None:
    version = ObjectVersion.of(5, validators_of({"Last-Modified": JANUARY}), "gzip")
    assert version == ObjectVersion(5, "", (("last-modified", JANUARY),), "gzip")
    learned = version.learned(validators_of({"ETag": 'W/"1"', "x-amz-version-id": "7", "Last-Modified": FEBRUARY}))
    assert (learned.etag, learned.encoding) == ('W/"1"', "gzip")
    assert learned.validators == (("etag", 'W/"1"'), ("last-modified", JANUARY), ("x-amz-version-id", "7"))
    assert ObjectVersion.of(5, learned.validators, "gzip") == learned == pickle.loads(pickle.dumps(learned))
    assert ObjectVersion(5, "").validators == ()


def test_validators_of_a_hostile_server_stay_small_and_are_still_compared() -> None:
    hostile = {f"x-checksum-{number}": "v" * 60_000 for number in range(1000)} | {"ETag": '"' + "e" * 60_000 + '"'}
    found = validators_of(hostile)
    assert len(pickle.dumps(found)) < 16_000
    assert dict(found)["etag"].startswith('"eee')
    assert find_change(found, validators_of({"ETag": '"' + "e" * 59_999 + 'f"'})) is not None


values = st.sampled_from(["one", "two", 'W/"one"', '"one"'])
names = ["etag", "last-modified", "x-amz-version-id", "x-goog-generation"]
validators = st.dictionaries(st.sampled_from(names), values).map(lambda found: tuple(sorted(found.items())))


def plain(name: str, value: str) -> str:
    """Model of a comparison: what is left of a value once what doesn't count is taken away."""
    return value.removeprefix("W/").strip('"') if name == "etag" else value


@given(ours=validators, theirs=validators)
def test_comparison_is_that_of_the_model(ours: Validators, theirs: Validators) -> None:
    expected, found = dict(ours), dict(theirs)
    shared = expected.keys() & found.keys()
    differs = any(plain(name, expected[name]) != plain(name, found[name]) for name in shared)
    proves = not expected or (bool(shared) and ("etag" not in expected or "etag" in found))
    difference = find_difference(ours, theirs)
    assert (difference is None) is (proves and not differs)
    assert (find_change(ours, theirs) is not None) is differs
    if difference is not None:
        assert difference.is_change is differs


@given(answers=st.lists(validators, max_size=5))
def test_answers_that_are_accepted_one_after_the_other_agree_in_all(answers: list[Validators]) -> None:
    known: Validators = ()
    accepted: list[Validators] = []
    for answer in answers:
        if find_difference(known, answer) is None:
            known = merged(known, answer)
            accepted.append(answer)
    for one in accepted:
        for other in accepted:
            assert find_change(one, other) is None


@pytest.mark.parametrize(
    "text",
    [
        "Thursday, 01-Jan-26 00:00:00 GMT",
        "Thu Jan  1 00:00:00 2026",
        "Thu, 01 Jan 2026 00:00:00 -0000",
        "Thu, 01 Jan 2026 01:00:00 +0100",
        "2026-01-01T00:00:00Z",
        "2026-01-01T00:00:00.250Z",
        "2026-01-01T01:00:00+01:00",
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_one_moment_is_no_change_in_whatever_form_it_is_written(
    monkeypatch: pytest.MonkeyPatch, zone: str, text: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        ours = validators_of({"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"})
        assert find_change(ours, validators_of({"Last-Modified": text})) is None
        later = text.replace("00:00", "00:01").replace("01:00+", "01:01+")
        assert find_change(ours, validators_of({"Last-Modified": later})) is not None
    finally:
        monkeypatch.undo()
        time.tzset()


def test_fractions_of_a_second_differ() -> None:
    ours, theirs = (validators_of({"Last-Modified": f"2026-01-01T00:00:00.{part}Z"}) for part in ("100", "200"))
    assert find_change(ours, theirs) is not None


def test_header_that_came_twice_says_no_more_than_once() -> None:
    once = validators_of({"ETag": '"1"', "Last-Modified": JANUARY, "x-amz-version-id": "7, 7"})
    assert (
        validators_of({"ETag": '"1", "1"', "Last-Modified": f"{JANUARY}, {JANUARY}", "x-amz-version-id": "7"}) == once
    )
    assert find_change(once, validators_of({"ETag": '"1", "2"'})) is not None
