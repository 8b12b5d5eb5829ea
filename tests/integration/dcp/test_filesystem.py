from __future__ import annotations

import contextlib
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import MpreaderError, ObjectMissing, S3ClientConfig, TransportError
from mpreader.dcp import S3FileSystem, S3StorageReader, S3StorageWriter, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def fs(bucket: str) -> Iterator[S3FileSystem]:
    fs = S3FileSystem("us-east-1")
    yield fs
    fs.close()


def write(fs: S3FileSystem, uri: str, data: bytes) -> None:
    with fs.create_stream(uri, "wb") as stream:
        stream.write(data)


def read(fs: S3FileSystem, uri: str) -> bytes:
    with fs.create_stream(uri, "rb") as stream:
        return bytes(stream.read())


def test_stream_reads_what_a_stream_wrote(fs: S3FileSystem, bucket: str) -> None:
    uri = f"s3://{bucket}/a b/ü+%20#?.bin"
    write(fs, uri, b"one")
    write(fs, uri, b"another")
    assert read(fs, uri) == b"another"


def test_stream_that_raises_writes_nothing(fs: S3FileSystem, bucket: str) -> None:
    def write_half() -> None:
        with fs.create_stream(f"s3://{bucket}/half", "wb") as stream:
            stream.write(b"half of it")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert not fs.exists(f"s3://{bucket}/half")


def test_stream_of_a_missing_object_raises_object_missing(fs: S3FileSystem, bucket: str) -> None:
    with pytest.raises(ObjectMissing):
        read(fs, f"s3://{bucket}/missing")


@pytest.mark.parametrize("mode", ["r", "w", "ab", "r+b"])
def test_stream_refuses_other_modes(fs: S3FileSystem, bucket: str, mode: str) -> None:
    with pytest.raises(ValueError, match="mode"), fs.create_stream(f"s3://{bucket}/x", mode):
        pass


def test_exists_and_remove_and_list(fs: S3FileSystem, bucket: str) -> None:
    base = f"s3://{bucket}/run"
    for name in ("b", "sub/a", "sub/c"):
        write(fs, fs.concat_path(base, name), b"x")
    write(fs, f"s3://{bucket}/running", b"another directory")
    assert fs.exists(f"{base}/b")
    assert not fs.exists(f"{base}/c")
    assert not fs.exists("s3://no-such-bucket-of-mine/c")
    assert fs.ls(base) == fs.ls(f"{base}/") == [f"{base}/b", f"{base}/sub/a", f"{base}/sub/c"]
    fs.rm_file(f"{base}/b")
    fs.rm_file(f"{base}/b")  # gone already
    assert not fs.exists(f"{base}/b")
    assert len(fs.ls(f"s3://{bucket}")) == 3


def test_rename_moves_the_object(fs: S3FileSystem, bucket: str) -> None:
    old, new = f"s3://{bucket}/old %2B+ü", f"s3://{bucket}/deep/new %2B+ü"
    write(fs, old, b"data")
    fs.rename(old, new)
    assert read(fs, new) == b"data"
    assert not fs.exists(old)
    fs.rename(new, new)
    assert read(fs, new) == b"data"


def test_rename_refuses_another_bucket(fs: S3FileSystem, bucket: str) -> None:
    write(fs, f"s3://{bucket}/x", b"data")
    with pytest.raises(ValueError, match="another bucket"):
        fs.rename(f"s3://{bucket}/x", "s3://other/x")
    with pytest.raises(ObjectMissing):
        fs.rename(f"s3://{bucket}/missing", f"s3://{bucket}/y")


def test_errors_other_than_missing_are_raised(aws_environment: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refuses connections
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        fs = S3FileSystem(s3client_config=S3ClientConfig(endpoint_url=endpoint, max_attempts=1))
        for method in (fs.exists, fs.rm_file, fs.ls):
            with pytest.raises(TransportError) as raised:
                method("s3://bucket/key")
            assert not isinstance(raised.value, ObjectMissing)


def test_file_system_pickles(fs: S3FileSystem, bucket: str) -> None:
    write(fs, f"s3://{bucket}/x", b"data")
    copy: S3FileSystem = pickle.loads(pickle.dumps(fs))
    assert read(copy, f"s3://{bucket}/x") == b"data"


def test_exists_takes_no_error_for_a_no(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/c"
    save({"w": torch.arange(3)}, storage_writer=S3StorageWriter("us-east-1", uri))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text("[default]\ncredential_process = /nonexistent/tool\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with contextlib.closing(S3FileSystem("us-east-1")) as fs:
        for call in (fs.exists, fs.ls, fs.rm_file, lambda path: read(fs, path)):
            with pytest.raises(MpreaderError, match="/nonexistent/tool"):
                call(f"{uri}/.metadata")
    with pytest.raises(MpreaderError, match="/nonexistent/tool"):
        load_checkpoint(uri)
    with S3StorageReader("us-east-1", uri) as reader:
        with pytest.raises(CheckpointException, match="no credentials could be had"):
            load({"w": torch.zeros(3, dtype=torch.int64)}, storage_reader=reader)
        for rank in ({}, {"rank": 0}):
            with pytest.raises(MpreaderError, match="/nonexistent/tool"):
                reader.read_metadata(**rank)
    with pytest.raises(CheckpointException) as caught:  # it asks whether there is a checkpoint that it would overwrite
        save({"w": torch.arange(3)}, storage_writer=S3StorageWriter("us-east-1", uri))
    assert all(isinstance(error, MpreaderError) for error, _ in caught.value.failures.values())
