"""Downloads of an object, or of ranges of it, into a file or a stream: in bounded memory, resumed, verified.

:mod:`~mpreader.tools.download.plan` decides which bytes are fetched, :mod:`~mpreader.tools.download.part_file` keeps
them until the file is whole, and this module fetches, writes and compares them. A file grows as ``FILE.part``; beside
it ``FILE.part.json`` names the object, its version and the ranges. It is renamed to ``FILE`` when it is whole, on the
disk, and verified. ``mpreader fetch`` calls :func:`download` and :func:`copy_to`, and shows progress and result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO
from urllib.parse import unquote

from mpreader.errors import ChecksumMismatch, ConfigError, ObjectChanged
from mpreader.fetch.fetcher import RangeFetcher
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.version import Validators, find_change
from mpreader.tools.download.checksums import Digests
from mpreader.tools.download.part_file import PartFile, write_all
from mpreader.tools.download.plan import DownloadPlan, RangeOfObject, Target

__all__ = ["Downloaded", "copy_to", "download", "name_of"]

OnProgress = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Downloaded:
    """Result of a download.

    Attributes:
        source: The object; a URL without user name, password and query.
        bytes: Size of the file, or bytes written to the stream.
        resumed_from: Bytes that an earlier call had left, and that were not fetched again.
        seconds: Time that this call took.
        checksum: Checksum of all the bytes, such as ``"sha256:9f86d0…"``; None if none was wanted.
        verified_against: The checksum that the bytes were compared with, in words; None if there was none.
        why_unverified: Reason, in words, for which there was none; None if they were verified.
        started_over: Reason, in words, for which an earlier call's part was dropped; None if none was.
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
    on_progress: OnProgress = lambda _done, _total: None,
) -> Downloaded:
    """Write an object, or ranges of it one behind the other, to a file, and verify it.

    The file appears once all of it is verified; until then ``FILE.part`` grows. If that was left by an earlier call for
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
    PartFile.check(path)  # before the server is asked for anything
    plan = DownloadPlan.of(fetcher, source, ranges, checksum)
    with PartFile(path, plan.identity(), resume=resume) as part:
        digests = plan.digests()
        kept = part.take_kept(digests.update)
        version = plan.version.learned(part.validators)
        try:
            _receive(fetcher, plan, version, part.write, digests, kept, on_progress, part.note)
            _verify(plan, digests)
        except (ChecksumMismatch, ObjectChanged):
            part.discard()  # else the next call would keep the wrong bytes, and only fetch the rest
            raise
        part.finish()
    return _result(plan, digests, kept, started, part.started_over)


def copy_to(
    fetcher: RangeFetcher,
    source: str,
    file: BinaryIO,
    ranges: Iterable[RangeOfObject] | None = None,
    *,
    checksum: str = "sha256",
    on_progress: OnProgress = lambda _done, _total: None,
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
        ChecksumMismatch: The bytes that were written differ from those that S3 has.
        MpreaderError: As for :func:`download`.
        OSError: The stream can't be written to.
    """
    started = time.monotonic()
    plan = DownloadPlan.of(fetcher, source, ranges, checksum)
    digests = plan.digests()
    # Not file.write alone: under PYTHONUNBUFFERED stdout is a raw file, whose write() may take a part of the bytes.
    _receive(fetcher, plan, plan.version, partial(write_all, file), digests, 0, on_progress)
    file.flush()
    _verify(plan, digests)  # a stream can't be taken back: the error comes after the bytes
    return _result(plan, digests, 0, started, None)


def name_of(source: str) -> str:
    """Last segment of an object's key, or of a URL's path: the name that a file of it gets.

    Raises:
        ConfigError: There is none that could be a file's name.
    """
    target = Target.of(source)
    key = target.key if source.startswith("s3://") else unquote(target.key)
    name = key.rpartition("/")[2]
    if name in ("", ".", "..") or "\0" in name:
        raise ConfigError(f"{target.uri} ends with no name that a file could have; name the file")
    return name


def _receive(
    fetcher: RangeFetcher,
    plan: DownloadPlan,
    version: ObjectVersion,
    write: Callable[[memoryview], object],
    digests: Digests,
    kept: int,
    on_progress: OnProgress,
    on_validators: Callable[[Validators], object] = lambda _: None,
) -> None:
    """Fetch and write all but the first ``kept`` bytes of a version, in order.

    ``on_validators`` is called when the answers have told more of the version than was known, before their bytes are
    written.

    Raises:
        ObjectChanged: The bytes that arrived are of another version than those that were kept, or the object was
            overwritten by the time that all had arrived.
    """
    done, nbytes = kept, plan.nbytes
    on_progress(done, nbytes)
    pieces = list(plan.pieces(kept, fetcher.part_size))
    if not pieces:  # an earlier call has fetched all, but could not finish the file
        return
    # In the order of the file, since it grows at its end, and without gaps, which would be fetched in vain.
    with (
        fetcher.pinned(plan.source, version) as (name, source),
        fetcher.stream(name, pieces, order="input", max_gap_size=0) as stream,
    ):
        for _, view in stream:
            if source.version != version:
                version = source.version
                on_validators(version.validators)
            write(view)
            digests.update(view)
            done += len(view)
            on_progress(done, nbytes)
            del view  # else its slot would stay occupied while the next view is waited for
    now = fetcher.stat(plan.source)
    if now.size != version.size or find_change(version.validators, now.validators) is not None:
        raise ObjectChanged(
            f"{plan.target.uri}: the object was overwritten while it was read; start again",
            bucket=plan.target.bucket,
            key=plan.target.key,
        )


def _verify(plan: DownloadPlan, digests: Digests) -> None:
    """Compare all bytes with the stored checksum, if there is one.

    Raises:
        ChecksumMismatch: They differ.
    """
    stored = plan.stored
    if stored is not None and digests.hex(stored.algorithm) != stored.digits:
        raise ChecksumMismatch(
            f"{plan.target.uri}: the bytes that arrived have {stored.algorithm} {digests.hex(stored.algorithm)}, but "
            f"{stored.description} is {stored.digits}; fetch it again (checksum none, if the service's are not to be "
            "trusted)",
            bucket=plan.target.bucket,
            key=plan.target.key,
            range=(0, plan.version.size),
            attempts=1,
        )


def _result(plan: DownloadPlan, digests: Digests, kept: int, started: float, started_over: str | None) -> Downloaded:
    return Downloaded(
        source=plan.target.uri,
        bytes=plan.nbytes,
        resumed_from=kept,
        seconds=time.monotonic() - started,
        checksum=None if plan.checksum is None else f"{plan.checksum}:{digests.hex(plan.checksum)}",
        verified_against=None if plan.stored is None else plan.stored.description,
        why_unverified=plan.why_unverified if plan.stored is None else None,
        started_over=started_over,
    )
