"""Download plan: the ranges of one version of an object that a download fetches, and the checksum that it must have.

:mod:`mpreader.tools.download.download` makes a plan and carries it out. Making one asks the server for the object's
version and, of a whole object on S3, for its stored checksum; it fetches no bytes of the object and touches no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mpreader.errors import ConfigError, PlanError
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.version import find_difference
from mpreader.ranges import ItemRange
from mpreader.tools.download.checksums import COMPUTABLE, Digests

__all__ = ["CHECKSUMS", "DownloadPlan", "RangeOfObject", "StoredChecksum", "Target"]

CHECKSUMS: Final = ("sha256", "crc32", "md5", "none")

RangeOfObject = tuple[int, int | None]


class Target(NamedTuple):
    """Names of an object that an error, or a file beside a download, may show: no secrets of its URL.

    Attributes:
        bucket: The bucket; of a URL the host.
        key: The key; of a URL its path, percent-encoded.
        uri: ``s3://bucket/key``, or the URL without user name, password and query.
    """

    bucket: str
    key: str
    uri: str

    @classmethod
    def of(cls, source: str) -> Target:
        """Take a source apart.

        Raises:
            ConfigError: It is neither ``s3://bucket/key`` nor an http(s) URL.
        """
        if source.startswith("s3://"):
            from mpreader.s3 import parse_s3_uri  # imports boto3, which is slow and not needed for a URL

            bucket, key = parse_s3_uri(source)
            if not key:
                raise ConfigError(f"{source!r} names a bucket, not an object in it; write s3://bucket/key")
            return cls(bucket, key, source)
        if "://" not in source:
            # Without query and user, which hold the secrets if it was meant as a URL and the scheme was forgotten.
            shown = source.partition("?")[0].rpartition("@")[2]
            raise ConfigError(f"not a source: {shown!r}; write s3://bucket/key or https://host/path")
        from mpreader.sources.http import HttpSource

        opened = HttpSource(source)
        return cls(opened.bucket, opened.key, opened.uri)


class StoredChecksum(NamedTuple):
    """A checksum of the whole object that S3 has stored.

    Attributes:
        algorithm: One of ``COMPUTABLE``.
        digits: Its hexadecimal digits.
    """

    algorithm: str
    digits: str

    @property
    def description(self) -> str:
        """The checksum in words."""
        if self.algorithm == "md5":
            return "the MD5 that is its ETag"
        return f"the {self.algorithm.upper()} that S3 has stored"


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """The bytes that a download fetches, and how they are verified.

    Attributes:
        source: The source as it was given, its secrets included.
        target: The source as it may be shown.
        version: Version of the object that the ranges are of.
        ranges: Ranges to fetch, in the order in which they are written one behind the other.
        checksum: Algorithm of the checksum that is reported; None: no checksum is wanted.
        stored: Checksum that the bytes are compared with; None: there is none.
        why_unverified: Reason, in words, for which ``stored`` is None.
    """

    source: str
    target: Target
    version: ObjectVersion
    ranges: list[ItemRange]
    checksum: str | None
    stored: StoredChecksum | None
    why_unverified: str

    @classmethod
    def of(
        cls, fetcher: RangeFetcher, source: str, ranges: Iterable[RangeOfObject] | None, checksum: str
    ) -> DownloadPlan:
        """Make a plan; the arguments are those of :func:`mpreader.tools.download.download.download`.

        Raises:
            ConfigError: ``checksum`` or ``source`` is wrong.
            PlanError: A range lies outside of the object.
            MpreaderError: As for :meth:`mpreader.RangeFetcher.stat`.
        """
        if checksum not in CHECKSUMS:
            raise ConfigError(f"checksum must be one of {', '.join(CHECKSUMS)}, got {checksum!r}")
        target = Target.of(source)
        version = fetcher.stat(source)
        wanted = [ItemRange(0, version.size)] if ranges is None else _resolve(target, ranges, version.size)
        algorithm = None if checksum == "none" else checksum
        stored, why = None, "it was not asked for"
        if algorithm is not None and ranges is not None:
            why = "only ranges were fetched, and checksums are those of whole objects"
        elif algorithm is not None:
            stored, why = _find_stored(fetcher, source, target, version, algorithm)
        return cls(source, target, version, wanted, algorithm, stored, why)

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges together."""
        return sum(item_range.size for item_range in self.ranges)

    def identity(self) -> dict[str, Any]:
        """Facts that must be the same for a download to go on where another one stopped."""
        return {
            "source": self.target.uri,
            "etag": self.version.etag,
            "validators": [list(validator) for validator in self.version.others],
            "size": self.version.size,
            "ranges": [[item_range.start, item_range.end] for item_range in self.ranges],
        }

    def digests(self) -> Digests:
        """New digests for the checksum that is reported and the one that is compared."""
        wanted = (self.checksum, self.stored.algorithm if self.stored else None)
        return Digests({algorithm for algorithm in wanted if algorithm is not None})

    def pieces(self, skip: int, most_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut the ranges, all but their first ``skip`` bytes, into ``(start, end)`` of at most ``most_bytes``."""
        for item_range in self.ranges:
            # The bytes to skip may cover whole ranges, and the beginning of the one after them.
            start = item_range.start + min(skip, item_range.size)
            skip -= start - item_range.start
            for piece_start in range(start, item_range.end, most_bytes):
                yield piece_start, min(piece_start + most_bytes, item_range.end)


def _resolve(target: Target, ranges: Iterable[RangeOfObject], size: int) -> list[ItemRange]:
    resolved = []
    for start, end in ranges:
        first = max(size + start, 0) if start < 0 else start
        last = size if end is None else end  # exclusive
        if not first <= last <= size:
            text = f"{start}-{'' if end is None else end}"
            raise PlanError(f"{target.uri}: the range {text} lies outside of its {size} bytes")
        resolved.append(ItemRange(first, last))
    return resolved


def _find_stored(
    fetcher: RangeFetcher, source: str, target: Target, version: ObjectVersion, algorithm: str
) -> tuple[StoredChecksum | None, str]:
    """Find a checksum that S3 has stored of this version, of the wanted algorithm if possible.

    Returns:
        The checksum and "", or None and the reason, in words, why there is none.
    """
    if not source.startswith("s3://"):
        return None, "an http server stores no checksum"
    stored = fetcher.client().checksums(target.bucket, target.key)
    # The checksums were asked for after the version, and may be those of a newer one.
    if find_difference(version.validators, stored.validators) is not None:
        return None, "the object was overwritten meanwhile"
    for name in (algorithm, *COMPUTABLE):
        if name in stored.by_algorithm:
            return StoredChecksum(name, stored.by_algorithm[name]), ""
    others = ", ".join(name.upper() for name in stored.by_algorithm)
    found = f"only {others}, which can't be computed here" if others else "no checksum of the whole object"
    return None, f"S3 has stored {found}"
