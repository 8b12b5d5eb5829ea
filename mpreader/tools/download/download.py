"""Objects, or ranges of them, into a file or a stream: in bounded memory, resumed where it stopped, verified.

A file grows as ``FILE.part``; ``FILE.part.json`` beside it says of what. What it was to become is renamed to ``FILE``
when it is whole, on the disk, and right.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Final, NamedTuple
from urllib.parse import unquote

from mpreader.errors import ChecksumMismatch, ConfigError, ObjectChanged, PlanError
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.pool.source import ObjectVersion
from mpreader.ranges import ItemRange
from mpreader.tools.download.checksums import COMPUTABLE, Digests
from mpreader.tools.download.part_file import PartFile, write_all

__all__ = ["CHECKSUMS", "Downloaded", "RangeOfObject", "copy_to", "download", "name_of"]

CHECKSUMS: Final = ("sha256", "crc32", "md5", "none")

RangeOfObject = tuple[int, int | None]
Progress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What became of a download.

    Attributes:
        source: What was fetched; a URL without user name, password and query.
        bytes: Size of the file, or of what was written to the stream.
        resumed_from: Bytes that an earlier call had left, and that were not fetched again.
        seconds: How long this call took.
        checksum: Of all the bytes, such as ``"sha256:9f86d0…"``; None if none was wanted.
        verified_against: What the bytes were compared with, in words; None if there was nothing.
        why_unverified: Why there was nothing, in words; None if they were verified.
        started_over: Why what an earlier call had left was of no use, in words; None if there was nothing or it was.
    """

    source: str
    bytes: int
    resumed_from: int
    seconds: float
    checksum: str | None
    verified_against: str | None
    why_unverified: str | None
    started_over: str | None = None


def download(
    fetcher: RangeFetcher,
    source: str,
    path: str | os.PathLike[str],
    ranges: Iterable[RangeOfObject] | None = None,
    *,
    resume: bool = True,
    checksum: str = "sha256",
    on_progress: Progress = lambda _done, _total: None,
) -> Downloaded:
    """Write an object, or ranges of it one behind the other, to a file, and verify it.

    The file is there once all of it is right; until then ``FILE.part`` grows. If that was left by an earlier call for
    the same ranges of the same version of the object, only the rest is fetched.

    Args:
        fetcher: Fetches the bytes.
        source: ``s3://bucket/key`` or an http(s) URL.
        path: The file; one that is there is replaced in the end.
        ranges: ``(start, end)`` in bytes, end exclusive, None for the object's end; a negative start counts from the
            end of the object, beyond its start means all of it. In any order. None: the whole object.
        resume: Go on where an earlier call stopped. False: start over.
        checksum: One of ``CHECKSUMS``. A whole object from S3 is compared with a checksum that S3 has stored, if there
            is one that can be computed; ``"none"``: nothing is computed or compared.
        on_progress: Is called with the bytes that are there, at first those that an earlier call had left, and the
            bytes of the whole file.

    Raises:
        ConfigError: ``checksum`` or ``source`` is wrong, or ``path`` names no regular file.
        PlanError: A range lies outside of the object.
        ChecksumMismatch: The file differs from what S3 has; it was removed.
        ObjectChanged: The object was overwritten meanwhile.
        MpreaderError: As for :meth:`mpreader.RangeFetcher.fetch`.
        OSError: The file can't be written, or another process is writing it.
    """
    started = time.monotonic()
    PartFile.check(path)
    order = _Order.of(fetcher, source, ranges, checksum)
    with PartFile(path, order.identity(), resume=resume) as part:
        digests = order.digests()
        kept = part.take_kept(digests.update)
        order.receive(fetcher, part.write, digests, kept, on_progress)
        try:
            verified_against = order.verify(digests)
        except ChecksumMismatch:
            part.discard()
            raise
        part.finish()
    return order.outcome(digests, kept, started, verified_against, part.started_over)


def copy_to(
    fetcher: RangeFetcher,
    source: str,
    file: BinaryIO,
    ranges: Iterable[RangeOfObject] | None = None,
    *,
    checksum: str = "sha256",
    on_progress: Progress = lambda _done, _total: None,
) -> Downloaded:
    """Write an object, or ranges of it one behind the other, to an open stream, and verify it afterwards.

    Args:
        fetcher: As for :func:`download`.
        source: As for :func:`download`.
        file: Is written to, and flushed.
        ranges: As for :func:`download`.
        checksum: As for :func:`download`.
        on_progress: As for :func:`download`.

    Raises:
        ChecksumMismatch: What was written differs from what S3 has.
        MpreaderError: As for :func:`download`.
        OSError: The stream can't be written to.
    """
    started = time.monotonic()
    order = _Order.of(fetcher, source, ranges, checksum)
    digests = order.digests()
    # Python's stdout is without a buffer under PYTHONUNBUFFERED.
    order.receive(fetcher, partial(write_all, file), digests, 0, on_progress)
    file.flush()
    return order.outcome(digests, 0, started, order.verify(digests), None)


def name_of(source: str) -> str:
    """The last segment of an object's key, or of a URL's path: what a file of it is called.

    Raises:
        ConfigError: There is none that could be a file's name.
    """
    key = _Target.of(source).key
    name = (key if source.startswith("s3://") else unquote(key)).rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in name:
        raise ConfigError(f"{_Target.of(source).uri} ends with no name that a file could have; name the file")
    return name


class _Target(NamedTuple):
    """What an error, or a file beside a download, may tell of a source: no secrets."""

    bucket: str
    key: str
    uri: str

    @classmethod
    def of(cls, source: str) -> _Target:
        if source.startswith("s3://"):
            from mpreader.s3 import parse_s3_uri

            bucket, key = parse_s3_uri(source)
            if not key:
                raise ConfigError(f"{source!r} names a bucket, not an object in it; write s3://bucket/key")
            return cls(bucket, key, source)
        if "://" not in source:
            shown = source.partition("?")[0].rpartition("@")[2]  # it may have been meant as a URL with secrets
            raise ConfigError(f"not a source: {shown!r}; write s3://bucket/key or https://host/path")
        from mpreader.sources.http import HttpSource

        opened = HttpSource(source)
        return cls(opened.bucket, opened.key, opened.uri)


@dataclass(frozen=True, slots=True)
class _Order:
    """What is to be fetched, of which version, and what it is to be compared with."""

    source: str
    target: _Target
    version: ObjectVersion
    ranges: list[ItemRange]
    checksum: str | None
    stored: tuple[str, str] | None  # algorithm and hexadecimal digits
    why_unverified: str

    @classmethod
    def of(cls, fetcher: RangeFetcher, source: str, ranges: Iterable[RangeOfObject] | None, checksum: str) -> _Order:
        if checksum not in CHECKSUMS:
            raise ConfigError(f"checksum must be one of {', '.join(CHECKSUMS)}, got {checksum!r}")
        asked = None if ranges is None else list(ranges)
        target = _Target.of(source)
        version = fetcher.stat(source)
        wanted = [ItemRange(0, version.size)] if asked is None else _resolve(target, asked, version.size)
        algorithm = None if checksum == "none" else checksum
        stored, why = None, "it was not asked for"
        if algorithm is not None and asked is not None:
            why = "only ranges were fetched, and checksums are those of whole objects"
        elif algorithm is not None:
            stored, why = _stored(fetcher, source, target, version, algorithm)
        return cls(source, target, version, wanted, algorithm, stored, why)

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges together."""
        return sum(item_range.size for item_range in self.ranges)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a download to go on where another one stopped."""
        return {
            "source": self.target.uri,
            "etag": self.version.etag,
            "size": self.version.size,
            "ranges": [[item_range.start, item_range.end] for item_range in self.ranges],
        }

    def digests(self) -> Digests:
        wanted = (self.checksum, self.stored[0] if self.stored else None)
        return Digests({algorithm for algorithm in wanted if algorithm is not None})

    def receive(
        self,
        fetcher: RangeFetcher,
        write: Callable[[memoryview], object],
        digests: Digests,
        kept: int,
        on_progress: Progress,
    ) -> None:
        """Fetch all but the first ``kept`` bytes, in order."""
        done, nbytes = kept, self.nbytes
        on_progress(done, nbytes)
        pieces = list(_pieces(self.ranges, kept, fetcher.part_size))
        if not pieces:
            return
        with fetcher.stream(self.source, pieces, order="input", max_gap_size=0) as stream:
            for _, view in stream:
                write(view)
                digests.update(view)
                done += len(view)
                on_progress(done, nbytes)
                del view  # or it would keep its memory while the next one is waited for
        # The stream is of one version; that it is ours is known only now.
        if fetcher.stat(self.source) != self.version:
            raise ObjectChanged(
                f"{self.target.uri}: the object was overwritten while it was read; start again",
                bucket=self.target.bucket,
                key=self.target.key,
            )

    def verify(self, digests: Digests) -> str | None:
        """Compare with what S3 has; what that was, in words."""
        if self.stored is None:
            return None
        algorithm, expected = self.stored
        what = "the MD5 that is its ETag" if algorithm == "md5" else f"the {algorithm.upper()} that S3 has stored"
        if digests.hex(algorithm) != expected:
            raise ChecksumMismatch(
                f"{self.target.uri}: the bytes that arrived have {algorithm} {digests.hex(algorithm)}, but {what} is "
                f"{expected}; fetch it again (checksum none, if the service's are not to be trusted)",
                bucket=self.target.bucket,
                key=self.target.key,
                range=(0, self.version.size),
                attempts=1,
            )
        return what

    def outcome(
        self, digests: Digests, kept: int, started: float, verified_against: str | None, started_over: str | None
    ) -> Downloaded:
        return Downloaded(
            source=self.target.uri,
            bytes=self.nbytes,
            resumed_from=kept,
            seconds=time.monotonic() - started,
            checksum=None if self.checksum is None else f"{self.checksum}:{digests.hex(self.checksum)}",
            verified_against=verified_against,
            why_unverified=None if verified_against else self.why_unverified,
            started_over=started_over,
        )


def _resolve(target: _Target, ranges: Sequence[RangeOfObject], size: int) -> list[ItemRange]:
    resolved = []
    for start, end in ranges:
        first = max(size + start, 0) if start < 0 else start
        last = size if end is None else end
        if not first <= last <= size:
            text = f"{start}-{'' if end is None else end}"
            raise PlanError(f"{target.uri}: the range {text} lies outside of its {size} bytes")
        resolved.append(ItemRange(first, last))
    return resolved


def _pieces(ranges: Iterable[ItemRange], skip: int, most_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut the ranges, but for their first ``skip`` bytes, into pieces of at most ``most_bytes``."""
    for item_range in ranges:
        start = item_range.start + min(skip, item_range.size)
        skip -= start - item_range.start
        for piece_start in range(start, item_range.end, most_bytes):
            yield piece_start, min(piece_start + most_bytes, item_range.end)


def _stored(
    fetcher: RangeFetcher, source: str, target: _Target, version: ObjectVersion, algorithm: str
) -> tuple[tuple[str, str] | None, str]:
    """A checksum that S3 has of this version, and else why there is none."""
    if not source.startswith("s3://"):
        return None, "an http server stores no checksum"
    stored = fetcher.client().checksums(target.bucket, target.key)
    if stored.etag != version.etag:
        return None, "the object was overwritten meanwhile"
    for name in (algorithm, *COMPUTABLE):
        if name in stored.by_algorithm:
            return (name, stored.by_algorithm[name]), ""
    others = ", ".join(name.upper() for name in stored.by_algorithm)
    what = f"only {others}, which can't be computed here" if others else "no checksum of the whole object"
    return None, f"S3 has stored {what}"
