"""fsspec's own suite for file systems: what it says of ``get`` and ``open`` holds for this one, too.

The suite writes the files that it reads. The file system only reads, so that here a subclass writes them by boto3; s3fs
can't be installed beside the boto3 of the tests, since its aiobotocore needs an older botocore.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.tests import abstract
from fsspec.tests.abstract import AbstractFixtures, AbstractGetTests

from mpreader.fsspec.filesystem import RangeFileSystem
from tests.integration.fsspec.conftest import CONFIG

pytestmark = pytest.mark.timeout(90)


class Upload(io.BytesIO):
    """File that is stored when it is closed."""

    def __init__(self, fs: WritingFileSystem, path: str) -> None:
        super().__init__()
        self._target = fs, path

    def close(self) -> None:
        if not self.closed:
            fs, path = self._target
            fs.pipe_file(path, self.getvalue())
        super().close()


class WritingFileSystem(RangeFileSystem):
    """The file system, with the methods that the suite writes by."""

    cachable = False
    client: Any  # boto3's

    def pipe_file(self, path: str, value: bytes) -> None:  # type: ignore[override]
        bucket, _, key = self._strip_protocol(path).partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=value)

    def pipe(self, path: str, value: bytes) -> None:  # type: ignore[override]
        self.pipe_file(path, value)

    def touch(self, path: str) -> None:  # type: ignore[override]
        self.pipe_file(path, b"")

    def mkdir(self, path: str) -> None:  # type: ignore[override]
        """Do nothing: a folder is there when something is in it."""

    def makedirs(self, path: str) -> None:  # type: ignore[override]
        """Do nothing, too."""

    def rm(self, path: str, recursive: bool = False) -> None:  # type: ignore[override]
        for name in self.expand_path(path, recursive=recursive):
            bucket, _, key = name.partition("/")
            self.client.delete_object(Bucket=bucket, Key=key)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return super().open(path, mode, **options)
        if mode == "xb" and self.exists(path):
            raise FileExistsError(path)
        return Upload(self, path)


class Fixtures(AbstractFixtures):  # type: ignore[misc]  # fsspec has no types
    @pytest.fixture
    def fs(self, aws_environment: None) -> Iterator[WritingFileSystem]:
        fs = WritingFileSystem(pool_config=CONFIG)
        with contextlib.closing(fs), contextlib.closing(boto3.client("s3")) as fs.client:
            yield fs

    @pytest.fixture
    def fs_path(self, bucket: str) -> str:
        return f"{bucket}/suite"

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return lambda *names: "/".join(names)

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return False

    @pytest.fixture
    def local_fs(self) -> LocalFileSystem:  # that of older versions of fsspec is of a kind that pytest warns of
        return LocalFileSystem(auto_mkdir=True)

    @pytest.fixture
    def local_path(self, tmp_path: os.PathLike[str]) -> str:
        return os.fspath(tmp_path)


class TestGet(Fixtures, AbstractGetTests):  # type: ignore[misc]
    pass


# Older versions of fsspec have no tests of open().
class TestOpen(Fixtures, getattr(abstract, "AbstractOpenTests", object)):  # type: ignore[misc]
    pass
