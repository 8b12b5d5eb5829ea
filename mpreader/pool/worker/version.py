"""Version of an object: the validators that a server sends with it, and the comparison of two answers by them.

A *validator* is a header by whose value one version of an object is told from another one: the ETag, the time of the
last change, a store's own number of the version, a checksum of the whole object. Everybody who reads an object compares
each answer with what was said before, by every validator that both have. This module is the only place that knows which
headers these are. It is used in the caller's process and in the workers, so it must stay quick to import.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

__all__ = [
    "Difference",
    "ObjectVersion",
    "Validators",
    "find_change",
    "find_difference",
    "is_strong",
    "merged",
    "validators_of",
]

Validators = tuple[tuple[str, str], ...]
"""Names, in lower case, and values of validators, sorted by name; each name is there once."""

ETAG: Final = "etag"
LAST_MODIFIED: Final = "last-modified"
# Headers that describe the bytes of one answer only, such as Content-MD5 and Content-Digest, are not among these, nor
# are those of metadata, which may change while the bytes stay (x-goog-metageneration).
_NAMES: Final = frozenset(
    {
        ETAG,
        LAST_MODIFIED,
        "x-goog-generation",  # Google: number of the version
        "x-goog-hash",
        "x-ms-blob-content-md5",  # Azure
        "x-oss-hash-crc64ecma",  # Alibaba
        "x-cos-hash-crc64ecma",  # Tencent
        "x-tos-hash-crc64ecma",  # Volcengine
        "x-bz-content-sha1",  # Backblaze
        "x-bz-file-id",
        "digest",  # RFC 3230
        "repr-digest",  # RFC 9530
    }
)
# x-amz-checksum-sha256 and the like; x-amz-checksum-type only says what kind they are. S3 sends them only to those who
# ask for them; other stores send them always. x-amz-version-id, x-oss-version-id, …; X-Checksum-Sha1 of repositories.
_PATTERN: Final = re.compile(
    r"x-amz-checksum-(?!type$|mode$|algorithm$)[a-z0-9]+|x-[a-z0-9]+-version-id|x-checksum-[a-z0-9]+"
)
# Headers that hold several values, each with the name of its algorithm. Servers write them in any order.
_LISTS: Final = frozenset({"x-goog-hash", "digest", "repr-digest"})
# A server is not trusted: what it sends is copied into messages to and from a worker, whose size is bounded.
_MOST_VALIDATORS: Final = 24
_MOST_CHARACTERS: Final = 256
_STRONG_ETAG: Final = re.compile(r'"[^"\x00-\x20\x7f]{0,254}"')


class ObjectVersion(NamedTuple):
    """The one version of an object that a load reads.

    Attributes:
        size: Bytes of the whole object.
        etag: ETag as the server wrote it, quotes and ``W/`` included; "" where the server gives none.
        others: The other validators that the server sent.
        encoding: ``Content-Encoding`` of an answer about the object, which belongs to the object as it is stored.
    """

    size: int
    etag: str
    others: Validators = ()
    encoding: str = ""

    @classmethod
    def of(cls, size: int, validators: Validators, encoding: str = "") -> ObjectVersion:
        """Make the version of an object from all its validators."""
        by_name = dict(validators)
        return cls(size, by_name.pop(ETAG, ""), tuple(by_name.items()), encoding)

    @property
    def validators(self) -> Validators:
        """All validators, the ETag among them. Empty: nobody can tell this version from another of the same size."""
        return tuple(sorted(((ETAG, self.etag), *self.others))) if self.etag else self.others

    def learned(self, found: Validators) -> ObjectVersion:
        """The same version, with the validators that it did not have yet."""
        return ObjectVersion.of(self.size, merged(self.validators, found), self.encoding)


class Difference(NamedTuple):
    """First difference between the expected version and an answer.

    Attributes:
        name: Name of the validator.
        expected: Its value in the expected version.
        found: Its value in the answer; "" if the answer does not have it.
    """

    name: str
    expected: str
    found: str

    @property
    def is_change(self) -> bool:
        """True if the answer is of another version; False if it only does not say of which one it is."""
        return bool(self.found)

    @property
    def header(self) -> str:
        """Name of the validator's header for people."""
        return {ETAG: "ETag", LAST_MODIFIED: "Last-Modified"}.get(self.name, self.name)

    def __str__(self) -> str:
        text = f"the answer is for {self.header} {self.found or '(none)'}, not {self.expected}"
        return "".join(letter if letter.isprintable() else "?" for letter in text)  # a server may send any bytes


def validators_of(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> Validators:
    """Pick the validators from the headers of an answer; where a header is repeated, its values are joined by commas.

    Args:
        headers: Names, in any case, and values.
    """
    found: dict[str, str] = {}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        name, value = name.lower(), _once(value)
        if value and (name in _NAMES or (name[:2] == "x-" and _PATTERN.fullmatch(name))):
            if name in _LISTS:
                found.update(_split(name, value))
            else:
                found[name] = _shortened(value)
    return tuple(sorted(found.items())[:_MOST_VALIDATORS])


def find_difference(expected: Validators, found: Validators) -> Difference | None:
    """Compare an answer with the expected version.

    Every validator that both have must be equal; ETags are compared weakly (RFC 9110, section 8.8.3.2), since a
    server may weaken the ETag of some answers. An ETag that was there must not be missing, and at least one validator
    must be shared, or the answer proves nothing.

    Returns:
        The first difference, one that shows a change before one that only lacks a proof; None if there is none.
    """
    change = find_change(expected, found)
    if change is not None or not expected:
        return change
    names = {name for name, _ in found}
    name, value = min(expected, key=_by_etag)
    if (name == ETAG and ETAG not in names) or names.isdisjoint(name for name, _ in expected):
        return Difference(name, value, "")
    return None


def find_change(known: Validators, found: Validators) -> Difference | None:
    """Compare two statements about an object by the validators that both have; None if all of them are equal."""
    theirs = dict(found)
    for name, value in sorted(known, key=_by_etag):
        if name in theirs and not _is_equal(name, value, theirs[name]):
            return Difference(name, value, theirs[name])
    return None


def merged(known: Validators, found: Validators) -> Validators:
    """Add the validators that are not known yet to those that are."""
    return tuple(sorted({**dict(found), **dict(known)}.items()))


def is_strong(etag: str) -> bool:
    """True if an ETag can be used in If-Match: a weak one never matches there, and one without quotes is none."""
    return _STRONG_ETAG.fullmatch(etag) is not None


def _by_etag(validator: tuple[str, str]) -> bool:
    """Order of a comparison: the ETag first. Where it differs, it names the new version best."""
    return validator[0] != ETAG


def _once(value: str) -> str:
    """Value of a header that came twice with the same value, and was joined by a comma."""
    half = len(value) // 2 - 1
    return value[:half] if half > 0 and value == f"{value[:half]}, {value[:half]}" else value


def _split(name: str, value: str) -> Iterable[tuple[str, str]]:
    for entry in value.split(","):
        algorithm, equals, digest = entry.strip().partition("=")
        if equals:
            yield f"{name} {algorithm.lower()[:32]}", _shortened(digest)


def _shortened(value: str) -> str:
    if len(value) <= _MOST_CHARACTERS:
        return value
    return f"{value[:_MOST_CHARACTERS]}…{zlib.crc32(value.encode()):08x}"


def _is_equal(name: str, ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    if name == ETAG:
        return _opaque(ours) == _opaque(theirs)
    return name == LAST_MODIFIED and _is_same_moment(ours, theirs)


def _opaque(etag: str) -> str:
    """The text of an ETag without the mark of a weak one and without quotes, which some servers leave out."""
    text = etag[2:] if etag[:2] in ("W/", "w/") else etag
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def _is_same_moment(ours: str, theirs: str) -> bool:
    """Compare two dates; servers may write one moment in different forms."""
    moments = [_moment(text) for text in (ours, theirs)]
    if "." not in ours or "." not in theirs:  # most forms have no fraction of a second
        moments = [None if moment is None else float(int(moment)) for moment in moments]
    return moments[0] is not None and moments[0] == moments[1]


def _moment(text: str) -> float | None:
    """Seconds since the epoch of a date, in a form of HTTP or of ISO 8601; None if it is none."""
    # Slow to import, and hardly ever needed.
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime

    try:
        if re.match("[0-9]{4}-", text):
            # Before Python 3.11 a "Z" at the end is none of ISO 8601.
            moment = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
        else:
            moment = parsedate_to_datetime(text)
        # Without a zone it is UTC, as in the form of asctime by RFC 9110, and not the local time of this host.
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
