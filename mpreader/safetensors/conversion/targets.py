"""Targets of a conversion: a directory or a single file, on S3 or on a local disk, that safetensors is written to.

The converter writes file after file, reads them back, and commits. What others can see before the commit::

    local folder    nothing: the files are written into a hidden folder within it, and renamed by commit()
    S3              each file that is complete; the index, which is written last, is not there

After an error no file that was written is left. A target must not know what is in the files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

from mpreader.errors import ConfigError, MpreaderError, ObjectMissing, PlanError
from mpreader.fetch.fetcher import RangeFetcher, SharedPoolFetcher
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import INDEX, SUFFIX
from mpreader.files import errors_naming, whole_file
from mpreader.readers.client import S3Client
from mpreader.s3 import parse_s3_uri

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig

__all__ = ["LocalTarget", "S3Target", "Target", "open_target"]


class Target(Protocol):
    """Target of a conversion.

    Attributes:
        file_name: Name of the single file; None: the target is a directory, whose files the converter names.
    """

    file_name: str | None

    def uri(self, name: str) -> str:
        """Return the path or the URI of a file."""

    def begin(self, names: Sequence[str], nbytes: int, *, overwrite: bool) -> None:
        """Prepare for files of these names, of ``nbytes`` bytes together.

        Raises:
            ConfigError: Files are there already, and ``overwrite`` is False; or the place does not exist.
            PlanError: There is too little space on the disk.
        """

    def create(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Open a new file: it is complete when the context ends, and does not exist if the context raises."""

    def blocks(self, name: str, ranges: Sequence[tuple[int, int]]) -> Generator[memoryview | bytes, None, None]:
        """Yield the bytes of ascending ranges of a file that was written; each is valid until the next one."""

    def commit(self) -> None:
        """Make the files that were written, and no older ones, the contents of the target."""

    def discard(self) -> None:
        """Remove what was written. Raises nothing."""


class LocalTarget:
    """Folder of a disk, or one file in it. See :class:`Target`."""

    def __init__(self, path: str) -> None:
        path = os.path.realpath(path)
        is_file = path.endswith(SUFFIX) and not os.path.isdir(path)
        self._folder = os.path.dirname(path) if is_file else path
        self.file_name = os.path.basename(path) if is_file else None
        self._staging = os.path.join(self._folder, f".mpreader-{secrets.token_hex(8)}.part")
        self._is_made = False  # the folder itself was made by this conversion
        self._written: list[str] = []
        self._stale: list[str] = []

    def uri(self, name: str) -> str:
        """Return the path of a file."""
        return os.path.join(self._folder, name)

    def begin(self, names: Sequence[str], nbytes: int, *, overwrite: bool) -> None:
        """Make the folder, and the hidden one that files are written to."""
        if self.file_name is None:
            self._make_folder()
        elif not os.path.isdir(self._folder):
            raise ConfigError(f"there is no folder {self._folder!r} to write {self.file_name!r} to; make it first")
        there = [name for name in _of_checkpoint(os.listdir(self._folder)) if self.file_name in (None, name)]
        _check_there(self._folder, there, overwrite=overwrite)
        self._stale = sorted(set(there) - set(names))
        status = os.statvfs(self._folder)
        free = status.f_bavail * status.f_frsize
        if nbytes > free:
            raise PlanError(f"{self._folder}: {nbytes} bytes are needed, but only {free} bytes are free on its disk")
        with errors_naming(self._folder):
            os.mkdir(self._staging)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new file in the hidden folder."""
        with errors_naming(self.uri(name)), whole_file(os.path.join(self._staging, name)) as file:
            yield file
        self._written.append(name)

    def blocks(self, name: str, ranges: Sequence[tuple[int, int]]) -> Generator[memoryview | bytes, None, None]:
        """Read ranges of a file of the hidden folder."""
        with errors_naming(self.uri(name)), open(os.path.join(self._staging, name), "rb", buffering=0) as file:
            for start, end in ranges:
                yield os.pread(file.fileno(), end - start, start)

    def commit(self) -> None:
        """Rename the files, in the order in which they were written."""
        with errors_naming(self._folder):
            for name in self._written[:-1]:
                os.replace(os.path.join(self._staging, name), self.uri(name))
            for name in self._stale:  # before the index comes, or without one they would belong to the checkpoint
                os.unlink(self.uri(name))
            os.replace(os.path.join(self._staging, self._written[-1]), self.uri(self._written[-1]))
            os.rmdir(self._staging)
            descriptor = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def discard(self) -> None:
        """Remove the hidden folder, and the folder itself if it was made."""
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._is_made:
            with contextlib.suppress(OSError):  # something else has written to it
                os.rmdir(self._folder)

    def _make_folder(self) -> None:
        if os.path.isdir(self._folder):
            return
        if os.path.exists(self._folder):
            raise ConfigError(f"{self._folder!r} is a file, not a folder")
        if not os.path.isdir(os.path.dirname(self._folder)):
            raise ConfigError(f"{self._folder!r} can't be made: the folder above it is missing")
        with errors_naming(self._folder):
            os.mkdir(self._folder)
        self._is_made = True


class S3Target:
    """Directory of a bucket, or one object. See :class:`Target`.

    Args:
        uri: Its ``s3://`` URI.
        client: Client that writes, lists and deletes.
        fetcher: Fetcher that reads files back.
    """

    def __init__(self, uri: str, client: S3Client, fetcher: RangeFetcher) -> None:
        bucket, key = parse_s3_uri(uri)
        directory, _, name = key.rpartition("/")
        is_file = key.endswith(SUFFIX)
        if not is_file:
            directory = key.rstrip("/")
        self.file_name = name if is_file else None
        self._bucket = bucket
        self._prefix = f"{directory}/" if directory else ""
        self._client = client
        self._fetcher = fetcher
        self._written: list[str] = []
        self._stale: list[str] = []

    def uri(self, name: str) -> str:
        """Return the URI of an object."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    def begin(self, names: Sequence[str], nbytes: int, *, overwrite: bool) -> None:  # noqa: ARG002  # S3 has room
        """Find out which objects are there, and delete an index that is to be replaced."""
        there = self._there()
        _check_there(self.uri(""), there, overwrite=overwrite)
        self._stale = sorted(set(there) - set(names))
        if INDEX in there:  # it would name a mixture of old and new files
            self._client.delete_object(self._bucket, f"{self._prefix}{INDEX}")

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """Open a new object."""
        self._written.append(name)  # first: an upload that is interrupted at its end may have made the object
        with self._client.put_object(self._bucket, f"{self._prefix}{name}") as writer:
            yield cast("BinaryIO", writer)

    def blocks(self, name: str, ranges: Sequence[tuple[int, int]]) -> Generator[memoryview | bytes, None, None]:
        """Read ranges of an object that was written."""
        with self._fetcher.stream(self.uri(name), ranges) as stream:
            for _, view in stream:
                yield view
                del view  # it would hold its memory until the next one has come

    def commit(self) -> None:
        """Delete the older files that no new one has replaced."""
        for name in self._stale:
            self._client.delete_object(self._bucket, f"{self._prefix}{name}")

    def discard(self) -> None:
        """Delete the objects that were written or begun."""
        for name in self._written:
            with contextlib.suppress(MpreaderError):  # the first error is already being raised
                self._client.delete_object(self._bucket, f"{self._prefix}{name}")

    def _there(self) -> list[str]:
        if self.file_name is not None:
            try:
                self._client.head_object(self._bucket, f"{self._prefix}{self.file_name}")
            except ObjectMissing as error:
                if "no such bucket" in str(error):
                    raise
                return []
            return [self.file_name]
        pages = self._client.list_objects(self._bucket, self._prefix, "/")
        return _of_checkpoint(info.key.removeprefix(self._prefix) for page in pages for info in page.object_info)


def _of_checkpoint(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(SUFFIX) or name == INDEX)


def _check_there(place: str, there: Sequence[str], *, overwrite: bool) -> None:
    if there and not overwrite:
        raise ConfigError(f"{place} has {there[0]!r} already; overwrite=True (--overwrite) replaces it")


@contextlib.contextmanager
def open_target(
    target: str, region: str | None, s3client_config: S3ClientConfig | None, pool_config: PoolConfig | None
) -> Iterator[Target]:
    """Open the target of a conversion: an ``s3://`` URI or a local path, of a directory or a ``.safetensors`` file.

    Raises:
        ConfigError: It is none of these.
    """
    if not target.startswith("s3://"):
        if "://" in target.removeprefix("file://"):
            raise ConfigError(f"can't write to {target!r}: write s3://bucket/key, or a local path")
        yield LocalTarget(path_of(target))
        return
    with (
        contextlib.closing(S3Client(region, s3client_config=s3client_config)) as client,
        SharedPoolFetcher(client.s3client_config, pool_config) as fetcher,
    ):
        yield S3Target(target, client, fetcher)
