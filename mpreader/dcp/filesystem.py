"""File system over S3, with the operations that torch's ``FileSystemReader`` and ``FileSystemWriter`` need.

The storage reader and writer use it, and users may. It translates each operation into requests of :class:`S3Client`; it
must not keep anything between two operations.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from io import IOBase
from typing import TYPE_CHECKING, cast

from torch.distributed.checkpoint.filesystem import FileSystemBase

from mpreader.errors import ConfigError, ObjectMissing
from mpreader.readers.client import S3Client
from mpreader.readers.kinds import S3ReaderConstructor
from mpreader.s3 import parse_s3_uri

if TYPE_CHECKING:
    from mpreader.config import S3ClientConfig
    from mpreader.readers.protocols import S3ReaderConstructorProtocol

__all__ = ["Path", "S3FileSystem"]

Path = str | os.PathLike[str]
"""URI of an object, or of all objects under a prefix."""


class S3FileSystem(FileSystemBase):
    """File system whose files are objects, named by their ``s3://bucket/key`` URI; there are no directories.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        s3_client: Client to use. None: a new one.
        s3client_config: Settings of the new client.
        reader_constructor: Makes the readers of the files. None: ``S3ReaderConstructor.default()``.

    Raises:
        ConfigError: Both ``s3_client`` and ``s3client_config`` are given.

    Attributes:
        client: The client; also used by the storage reader for its downloads.
        reader_constructor: Constructor of the readers.
    """

    def __init__(
        self,
        region: str | None = None,
        s3_client: S3Client | None = None,
        s3client_config: S3ClientConfig | None = None,
        reader_constructor: S3ReaderConstructorProtocol | None = None,
    ) -> None:
        if s3_client is not None and s3client_config is not None:
            raise ConfigError("give either s3_client or s3client_config: the client has its own settings")
        self.client = s3_client or S3Client(region, s3client_config=s3client_config)
        self.reader_constructor = reader_constructor or S3ReaderConstructor.default()

    @contextmanager
    def create_stream(self, path: Path, mode: str) -> Generator[IOBase, None, None]:
        """Open an object.

        Args:
            path: URI of the object.
            mode: ``"rb"`` reads the object. ``"wb"`` writes a new one: it appears as a whole when the block ends, and
                not at all if the block raises.

        Raises:
            ValueError: ``mode`` is neither of the two, or ``path`` is not a URI.
            TransportError: The object can't be read or written.
        """
        bucket, key = _parse(path)
        if mode == "rb":
            with self.client.get_object(bucket, key, reader_constructor=self.reader_constructor) as reader:
                yield cast(IOBase, reader)
        elif mode == "wb":
            with self.client.put_object(bucket, key) as writer:
                yield cast(IOBase, writer)
        else:
            raise ValueError(f'mode must be "rb" or "wb", got {mode!r}')

    def concat_path(self, path: Path, suffix: str) -> str:
        """Returns the URI of ``suffix`` under ``path``."""
        # Nothing is normalized, unlike in a path of a disk: every slash is part of an object's key.
        base = os.fspath(path)
        return base + suffix if base.endswith("/") else f"{base}/{suffix}"

    def init_path(self, path: Path) -> str:
        """Returns the URI as text.

        Raises:
            ValueError: ``path`` is not a URI.
        """
        _parse(path)
        return os.fspath(path)

    def rename(self, path: Path, new_path: Path) -> None:
        """Copy the object and delete the old one; S3 has no renaming.

        Raises:
            ValueError: The two are not in the same bucket.
            TransportError: The object could not be copied (then nothing has changed), or the old one could not be
                deleted (then both exist).
        """
        bucket, key = _parse(path)
        new_bucket, new_key = _parse(new_path)
        if bucket != new_bucket:
            raise ValueError(f"can't rename {path} to {new_path}: an object can't move to another bucket")
        if key == new_key:
            return  # deleting the old object would delete the only one
        self.client.copy_object(bucket, key, new_bucket, new_key)
        self.client.delete_object(bucket, key)

    def mkdir(self, path: Path) -> None:
        """Do nothing: S3 has no directories."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Returns True if ``checkpoint_id`` is an ``s3://`` URI."""
        try:
            _parse(checkpoint_id)
        except (TypeError, ValueError):
            return False
        return True

    def exists(self, path: Path) -> bool:
        """Returns True if the object exists.

        Raises:
            TransportError: The request has failed for another reason than a missing object.
        """
        try:
            self.client.head_object(*_parse(path))
        except ObjectMissing:
            return False
        return True

    def rm_file(self, path: Path) -> None:
        """Delete the object, if it exists.

        Raises:
            TransportError: The object could not be deleted.
        """
        self.client.delete_object(*_parse(path))

    def ls(self, path: Path) -> list[str]:
        """Returns the URIs of all objects under ``path``, at any depth, in the order of their keys.

        Raises:
            TransportError: The objects can't be listed.
        """
        bucket, key = _parse(path)
        # With a slash at the end, so that "run-1" does not list the objects of "run-10".
        prefix = key if not key or key.endswith("/") else f"{key}/"
        pages = self.client.list_objects(bucket, prefix)
        return [f"s3://{bucket}/{listed.key}" for page in pages for listed in page.object_info]

    def close(self) -> None:
        """Close the client's connections; a later operation opens new ones."""
        self.client.close()

    def __repr__(self) -> str:
        reader_type = S3ReaderConstructor.get_reader_type_string(self.reader_constructor)
        return f"<{type(self).__name__} reader_type={reader_type}>"


def _parse(path: Path) -> tuple[str, str]:
    return parse_s3_uri(os.fspath(path))
