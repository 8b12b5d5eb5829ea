"""Fixtures of the tests of the file system: file systems that are closed again, and objects in a bucket."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import boto3
import pytest

from mpreader import PoolConfig
from mpreader.config import KiB, MiB
from mpreader.fsspec.filesystem import RangeFileSystem

CONFIG = PoolConfig(workers=1, connections_per_worker=4, max_memory=4 * MiB, part_size=64 * KiB)


class MakeFileSystem(Protocol):
    """Makes a file system that is closed when the test ends."""

    def __call__(self, **options: Any) -> RangeFileSystem: ...


class Fill(Protocol):
    """Puts objects into the bucket of the test, by their keys."""

    def __call__(self, objects: Mapping[str, bytes]) -> None: ...


@pytest.fixture
def make_fs(aws_environment: None) -> Iterator[MakeFileSystem]:
    with contextlib.ExitStack() as made:
        made.callback(RangeFileSystem.clear_instance_cache)

        def make(**options: Any) -> RangeFileSystem:
            fs = RangeFileSystem(**{"pool_config": CONFIG, **options})
            made.callback(fs.close)
            return fs

        yield make


@pytest.fixture
def fill(bucket: str) -> Iterator[Fill]:
    with contextlib.closing(boto3.client("s3")) as client:

        def fill(objects: Mapping[str, bytes]) -> None:
            for key, content in objects.items():
                client.put_object(Bucket=bucket, Key=key, Body=content)

        yield fill
