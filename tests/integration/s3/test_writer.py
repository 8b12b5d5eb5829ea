"""S3Writer against the embedded S3: an object is made wholly or not at all."""

from __future__ import annotations

import array
import gc
import os
import secrets
from collections.abc import Iterator
from typing import Any

import boto3
import numpy as np
import pytest

from mpreader import ObjectMissing, S3Client, S3ClientConfig
from mpreader.config import MiB
from mpreader.testing import S3Server

_PART = 5 * MiB


@pytest.fixture
def client(aws_environment: None) -> Iterator[S3Client]:
    client = S3Client(s3client_config=S3ClientConfig(part_size=_PART, max_attempts=2))
    yield client
    client.close()


def _open_uploads(bucket: str) -> int:
    boto = boto3.client("s3")
    uploads = boto.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    boto.close()
    return len(uploads)


def _requests(server: S3Server, bucket: str) -> list[str]:
    return [request.method for request in server.requests if request.path.startswith(f"/{bucket}/")]


@pytest.mark.parametrize("size", [0, 1, _PART - 1, _PART, _PART + 1, 3 * _PART, 4 * _PART + 7])
def test_writer_makes_the_object_of_what_was_written(client: S3Client, bucket: str, size: int) -> None:
    data = secrets.token_bytes(size)
    with client.put_object(bucket, "key") as writer:
        for start in range(0, size, 1_999_999):
            writer.write(data[start : start + 1_999_999])
        assert writer.tell() == size
    assert client.get_object(bucket, "key").read() == data
    assert _open_uploads(bucket) == 0


@pytest.mark.parametrize(("size", "methods"), [(_PART, ["PUT"]), (_PART + 1, ["POST", "PUT", "PUT", "POST"])])
def test_writer_needs_parts_only_beyond_one(
    client: S3Client, bucket: str, s3_server: S3Server, size: int, methods: list[str]
) -> None:
    with client.put_object(bucket, "key") as writer:
        writer.write(bytes(size))
    assert _requests(s3_server, bucket) == methods


def test_writer_takes_any_buffer_and_lets_it_change(client: S3Client, bucket: str) -> None:
    floats = array.array("d", [1.5, 2.5])
    grid: Any = np.arange(12, dtype="<i4").reshape(3, 4)
    changing = bytearray(b"first")
    expected = floats.tobytes() + grid.tobytes() + grid.T.tobytes() + b"first" + grid[:, 1].tobytes()
    with client.put_object(bucket, "key") as writer:
        assert writer.write(memoryview(floats)) == 16
        assert writer.write(grid) == 48
        assert writer.write(grid.T) == 48
        assert writer.write(changing) == 5
        changing[:] = b"later"
        assert writer.write(grid[:, 1]) == 12
        assert writer.write(grid[:0]) == 0
        with pytest.raises(TypeError):
            writer.write("text")  # type: ignore[arg-type]
    assert client.get_object(bucket, "key").read() == expected


@pytest.mark.parametrize("size", [100, 2 * _PART])
def test_writer_leaves_nothing_when_the_block_raises(client: S3Client, bucket: str, size: int) -> None:
    def fail_half_way() -> None:
        with client.put_object(bucket, "key") as writer:
            writer.write(bytes(size))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert _open_uploads(bucket) == 0
    with pytest.raises(ObjectMissing):
        client.head_object(bucket, "key")


@pytest.mark.parametrize("size", [100, 3 * _PART])
def test_writer_leaves_nothing_when_it_is_dropped(client: S3Client, bucket: str, size: int) -> None:
    writer = client.put_object(bucket, "key")
    writer.write(bytes(size))
    del writer
    gc.collect()
    assert _open_uploads(bucket) == 0
    with pytest.raises(ObjectMissing):
        client.head_object(bucket, "key")


def test_writer_that_fails_raises_once_and_is_closed(client: S3Client) -> None:
    writer = client.put_object("no-such-bucket", "key")
    writer.write(b"data")
    with pytest.raises(ObjectMissing, match="there is no such bucket"):
        writer.close()
    assert writer.closed
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"more")


def test_writer_that_fails_in_a_part_raises_in_a_write_and_is_closed(client: S3Client, bucket: str) -> None:
    writer = client.put_object(bucket, "key")
    writer.write(bytes(_PART + 1))
    client.call("delete_bucket", bucket)
    with pytest.raises(ObjectMissing, match="there is no such bucket"):
        writer.write(bytes(5 * _PART))
    assert writer.closed
    writer.close()


def test_writer_closes_once(client: S3Client, bucket: str, s3_server: S3Server) -> None:
    writer = client.put_object(bucket, "key")
    writer.write(b"data")
    writer.close()
    writer.close()
    assert _requests(s3_server, bucket) == ["PUT"]
    assert (writer.closed, writer.writable(), writer.readable(), writer.tell()) == (True, False, False, 4)


def test_writer_stores_in_the_class_asked_for(client: S3Client, bucket: str) -> None:
    for key, size in (("small", 1), ("large", _PART + 1)):
        with client.put_object(bucket, key, storage_class="STANDARD_IA") as writer:
            writer.write(bytes(size))
        assert client.head_object(bucket, key).storage_class == "STANDARD_IA"


def test_writer_holds_three_parts_at_most(client: S3Client, bucket: str) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    chunk = bytes(MiB)
    with client.put_object(bucket, "warm") as writer:
        for _ in range(20):
            writer.write(chunk)
    before = resident()
    with client.put_object(bucket, "key") as writer:
        for _ in range(100):
            writer.write(chunk)
        assert resident() - before < 5 * _PART
