"""mpreader's fsspec file system: it does what fsspec's own in memory does with the same files, and only reads."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import gzip
import importlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from fsspec.callbacks import Callback
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from mpreader import ConfigError, ObjectChanged, ObjectMissing, PoolConfig, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.testing import Fault, FaultKind, FaultServer, S3Server

pytestmark = pytest.mark.timeout(90)

TEXT = "".join(f"line {number}, Größe\n" for number in range(2000))
FILES = {
    "data.bin": random.Random(0).randbytes(300_000),
    "empty": b"",
    "text.txt": TEXT.encode(),
    "folder/one.csv": b"a,b\n1,2\n",
    "folder/two.csv": b"a,b\n3,4\n",
    "folder/deep/three.txt": b"three",
    "folder/deep/er/four.txt": b"four",
    "folder-not/five.txt": b"five",
    "same": b"a file",
    "same/name": b"in a folder of that name",
    "odd/a b+c%20#d?e.bin": b"odd",
}
CONFIG = PoolConfig(workers=1, connections_per_worker=4, max_memory=4 * MiB, part_size=64 * KiB)


@pytest.fixture(scope="module")
def filled_bucket(s3_server: S3Server) -> str:
    """A bucket with FILES."""
    name = "filesystem-of-the-unit-tests"
    s3_server.create_bucket(name)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in s3_server.environment().items():
            patch.setenv(variable, value)
        client = boto3.client("s3")
        for key, content in FILES.items():
            client.put_object(Bucket=name, Key=key, Body=content)
        client.close()
    return name


@pytest.fixture
def root(filled_bucket: str, aws_environment: None) -> str:
    return filled_bucket


@pytest.fixture
def fs(aws_environment: None) -> Iterator[RangeFileSystem]:
    fs = RangeFileSystem(pool_config=CONFIG)
    yield fs
    fs.close()
    RangeFileSystem.clear_instance_cache()


@pytest.fixture
def model(root: str) -> Iterator[MemoryFileSystem]:
    """fsspec's own file system with the same files; but it can't have a file and a folder of the same name."""
    model = MemoryFileSystem()
    for key, content in FILES.items():
        if not key.startswith("same"):
            model.pipe_file(f"/{root}/{key}", content)
    yield model
    model.store.clear()
    model.pseudo_dirs[:] = [""]
    MemoryFileSystem.clear_instance_cache()


def gets(server: S3Server, seen: int) -> list[str]:
    return [f"{request.method} {request.path.rpartition('/')[2]}" for request in server.requests[seen:]]


# -- bytes

limit = st.one_of(st.none(), st.integers(-310_000, 310_000), st.integers(-3, 3))
names = st.sampled_from(["data.bin", "empty", "folder/one.csv"])


@settings(max_examples=40)
@given(ranges=st.lists(st.tuples(names, limit, limit), max_size=8), max_gap=st.sampled_from([None, 0, 1000, 1e9]))
def test_cat_ranges_gives_what_slices_do(
    fs: RangeFileSystem, root: str, ranges: list[tuple[str, int | None, int | None]], max_gap: float | None
) -> None:
    paths, starts, ends = [[*column] for column in zip(*ranges, strict=True)] or [[], [], []]
    contents = fs.cat_ranges([f"{root}/{path}" for path in paths], starts, ends, max_gap=max_gap)
    assert contents == [FILES[path][start:end] for path, start, end in ranges]
    assert all(type(content) is bytes for content in contents)


@pytest.mark.parametrize("start", [None, 0, 5, -7, -100])
@pytest.mark.parametrize("end", [None, 0, 3, 8, 100, -3, -100])
def test_cat_file_gives_what_fsspec_does(
    fs: RangeFileSystem, model: MemoryFileSystem, root: str, start: int | None, end: int | None
) -> None:
    path = f"{root}/folder/one.csv"
    assert fs.cat_file(path, start, end) == model.cat_file(path, start, end)


def test_cat_ranges_takes_one_limit_for_all_and_asks_once_for_near_ranges(
    fs: RangeFileSystem, root: str, s3_server: S3Server
) -> None:
    path = f"{root}/data.bin"
    seen = len(s3_server.requests)
    assert fs.cat_ranges([path, path], 1000, [2000, None]) == [FILES["data.bin"][1000:2000], FILES["data.bin"][1000:]]
    assert fs.cat_ranges([path] * 3, [0, 900, 1800], [10, 910, 1810], max_gap=900)[2] == FILES["data.bin"][1800:1810]
    assert gets(s3_server, seen).count("HEAD data.bin") == 2, "one for each call"
    seen = len(s3_server.requests)
    fs.cat_ranges([path] * 3, [0, 900, 1800], [10, 910, 1810], max_gap=900)
    assert gets(s3_server, seen) == ["HEAD data.bin", "GET data.bin"]
    seen = len(s3_server.requests)
    fs.cat_ranges([path] * 3, [0, 900, 1800], [10, 910, 1810], max_gap=10)
    assert gets(s3_server, seen) == ["HEAD data.bin", *["GET data.bin"] * 3]


def test_cat_ranges_gives_errors_in_their_places_or_raises_the_first(fs: RangeFileSystem, root: str) -> None:
    paths = [f"{root}/data.bin", f"{root}/missing", root, f"{root}/empty", f"{root}/missing"]
    first, missing, bucket, empty, again = fs.cat_ranges(paths, 0, 4)
    assert (first, empty) == (FILES["data.bin"][:4], b"")
    assert isinstance(missing, FileNotFoundError)
    assert isinstance(missing, ObjectMissing)
    assert isinstance(bucket, IsADirectoryError)
    assert isinstance(again, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="missing"):
        fs.cat_ranges(paths, 0, 4, on_error="raise")


def test_error_while_files_are_read_takes_the_place_of_one_file_only(fs: RangeFileSystem) -> None:
    with FaultServer({"/first": b"first", "/gone": b"gone", "/last": b"last"}) as server:
        server.inject(Fault(FaultKind.STATUS, status=404, path="/gone"))  # its HEAD is answered
        paths = [server.url(path) for path in ("/first", "/gone", "/last", "/gone")]
        first, gone, last, again = fs.cat_ranges(paths, 0, 2)
        assert (first, last) == (b"fi", b"la")
        assert isinstance(gone, ObjectMissing)
        assert isinstance(again, ObjectMissing)
        with pytest.raises(ObjectMissing):
            fs.cat_ranges(paths, 0, 2, on_error="raise")


def test_cat_ranges_refuses_what_does_not_fit_together(fs: RangeFileSystem, root: str) -> None:
    with pytest.raises(ValueError, match="2 paths need as many starts and ends, got 1"):
        fs.cat_ranges([root, root], [0], 1)
    with pytest.raises(TypeError, match="a list of paths"):
        fs.cat_ranges(f"{root}/data.bin", 0, 1)
    with pytest.raises(TypeError, match="indices"):
        fs.cat_ranges([f"{root}/data.bin"], ["0"], 1)  # type: ignore[list-item]


def test_cat_file_reads_what_is_larger_than_all_shared_memory(fs: RangeFileSystem, bucket: str) -> None:
    content = random.Random(1).randbytes(9 * MiB)
    assert CONFIG.max_memory is not None
    assert len(content) > 2 * CONFIG.max_memory
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="large", Body=content)
    client.close()
    assert fs.cat_file(f"s3://{bucket}/large") == content
    assert fs.cat_ranges([f"{bucket}/large"] * 2, [-5 * MiB, 0], [None, 5 * MiB]) == [
        content[-5 * MiB :],
        content[: 5 * MiB],
    ]


def test_cat_gives_one_or_many_as_fsspec_does(fs: RangeFileSystem, model: MemoryFileSystem, root: str) -> None:
    def of(by_path: dict[str, bytes]) -> dict[str, bytes]:
        return {path.lstrip("/"): content for path, content in by_path.items()}

    for path in (f"{root}/folder/*.csv", f"{root}/folder/**/*.txt", [f"{root}/text.txt", f"{root}/empty"]):
        assert fs.cat(path) == of(model.cat(path)), path
    assert fs.cat(f"{root}/empty") == b""
    assert fs.cat(f"mpreader://{root}/text.txt", start=5, end=-5) == FILES["text.txt"][5:-5]
    assert fs.cat(f"{root}/folder", recursive=True) == {
        f"{root}/{key}": content for key, content in FILES.items() if key.startswith("folder/")
    }
    paths = [f"{root}/empty", f"{root}/missing"]
    assert fs.cat(paths, on_error="omit") == {paths[0]: b""}
    assert isinstance(fs.cat(paths, on_error="return")[paths[1]], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat(paths)


def test_get_copies_files_in_bounded_memory_and_tells_of_progress(
    fs: RangeFileSystem, root: str, bucket: str, tmp_path: Path
) -> None:
    fs.get(f"{root}/folder", f"{tmp_path}/copy", recursive=True)
    copied = {str(path.relative_to(tmp_path / "copy")): path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert copied == {key.removeprefix("folder/"): FILES[key] for key in FILES if key.startswith("folder/")}
    content = random.Random(2).randbytes(2 * CONFIG.value("max_memory") + 1)
    with contextlib.closing(boto3.client("s3")) as client:
        client.put_object(Bucket=bucket, Key="large", Body=content)
    progress = Callback()
    fs.get_file(f"{bucket}/large", tmp_path / "new folder" / "large", callback=progress)
    assert (tmp_path / "new folder" / "large").read_bytes() == content
    assert progress.size == progress.value == len(content)
    opened = io.BytesIO()
    fs.get_file(f"{root}/text.txt", opened)
    assert opened.getvalue() == FILES["text.txt"]


def test_url_is_a_file(fs: RangeFileSystem, tmp_path: Path) -> None:
    with FaultServer({"/folder/file": FILES["data.bin"]}) as server:
        url = f"{server.endpoint_url}/folder/file"
        assert fs.cat_ranges([url, url, f"{url}-not"], [10, -5, 0], [20, None, 1])[:2] == [
            FILES["data.bin"][10:20],
            FILES["data.bin"][-5:],
        ]
        signed = f"{url}?signature=*"  # no pattern
        assert fs.cat(signed) == FILES["data.bin"]
        assert fs.glob(signed) == fs.find(signed) == fs.ls(signed, detail=False) == [signed]
        assert (fs.size(url), fs.isfile(url), fs.exists(f"{url}-not")) == (300_000, True, False)
        with fsspec.open(f"mpreader://{url}") as file:
            file.seek(-10, 2)
            assert file.read() == FILES["data.bin"][-10:]
        fs.get(url, str(tmp_path / "got"))
        assert (tmp_path / "got").read_bytes() == FILES["data.bin"]
        with pytest.raises(FileNotFoundError):
            fs.open(f"{url}-not")
        with pytest.raises(OSError, match="does not say"):
            fs.modified(url)


# -- open files

steps = st.lists(
    st.one_of(
        st.tuples(st.just("seek"), st.integers(0, 60_000)),
        st.tuples(st.just("read"), st.integers(0, 70_000)),
        st.tuples(st.just("readinto"), st.integers(0, 70_000)),
        st.tuples(st.just("readline"), st.none()),
        st.tuples(st.just("read"), st.none()),
    ),
    max_size=8,
)


@settings(max_examples=30)
@given(steps=steps, block_size=st.sampled_from([100, 4096, 10**6]), cache_type=st.sampled_from(["readahead", "none"]))
def test_open_file_reads_and_seeks_as_one_in_memory(
    fs: RangeFileSystem,
    model: MemoryFileSystem,
    root: str,
    steps: list[tuple[str, int | None]],
    block_size: int,
    cache_type: str,
) -> None:
    with (
        fs.open(f"{root}/text.txt", block_size=block_size, cache_type=cache_type) as file,
        model.open(f"{root}/text.txt") as expected,
    ):
        for name, argument in steps:
            if name == "readline":
                assert file.readline() == expected.readline()
            elif name == "readinto":
                buffers = bytearray(argument or 0), bytearray(argument or 0)
                assert file.readinto(buffers[0]) == expected.readinto(buffers[1])
                assert buffers[0] == buffers[1]
            else:
                if name == "seek":
                    assert argument is not None
                    argument = min(argument, len(FILES["text.txt"]))
                assert getattr(file, name)(argument) == getattr(expected, name)(argument)
            assert file.tell() == expected.tell()


@pytest.mark.parametrize("cache_type", ["all", "background", "blockcache", "bytes", "first", "none"])
def test_open_file_works_with_each_of_fsspecs_caches(fs: RangeFileSystem, root: str, cache_type: str) -> None:
    with fs.open(f"{root}/data.bin", block_size=10_000, cache_type=cache_type) as file:
        assert file.read(10) == FILES["data.bin"][:10]
        file.seek(-12_345, 2)
        assert file.read() == FILES["data.bin"][-12_345:]
        assert file.size == len(FILES["data.bin"])


def test_open_file_gives_text_lines_and_compressed_content(fs: RangeFileSystem, root: str, bucket: str) -> None:
    with fs.open(f"{root}/text.txt", "r", encoding="utf-8") as lines:
        assert [*lines] == TEXT.splitlines(keepends=True)
    assert fs.read_text(f"{root}/folder/one.csv") == "a,b\n1,2\n"
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="text.gz", Body=gzip.compress(TEXT.encode()))
    client.close()
    with fsspec.open(f"mpreader://{bucket}/text.gz", "rt", compression="infer", encoding="utf-8") as text:
        assert text.read() == TEXT


def test_open_file_reads_one_version_to_the_end(fs: RangeFileSystem, bucket: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="file", Body=b"old" * 1000)
    with fs.open(f"{bucket}/file", block_size=10, cache_type="none") as file:
        assert file.read(3) == b"old"
        copied = pickle.loads(pickle.dumps(file))
        assert (copied.tell(), copied.read(3)) == (3, b"old")
        client.put_object(Bucket=bucket, Key="file", Body=b"new" * 1000)
        with pytest.raises(ObjectChanged):
            file.read(3)
        with copied, pytest.raises(ObjectChanged):
            copied.read(3)
    client.close()
    assert fs.cat_file(f"{bucket}/file", 0, 3) == b"new"


def test_open_file_asks_for_its_version_once(fs: RangeFileSystem, root: str, s3_server: S3Server) -> None:
    seen = len(s3_server.requests)
    with fs.open(f"{root}/data.bin", cache_type="none") as file:
        for offset in (0, 200_000, 100_000):
            file.seek(offset)
            assert file.read(10) == FILES["data.bin"][offset : offset + 10]
    assert gets(s3_server, seen) == ["HEAD data.bin", *["GET data.bin"] * 3]


def test_open_of_what_is_no_file_says_so(fs: RangeFileSystem, root: str) -> None:
    with pytest.raises(FileNotFoundError):
        fs.open(f"{root}/missing")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{root}/folder")
    with pytest.raises(IsADirectoryError):
        fs.open(root)
    with pytest.raises(ValueError, match="mode must be 'rb' or 'r', got 'zb'"):
        fs.open(f"{root}/data.bin", "z")


# -- names


def of_model(paths: list[str]) -> list[str]:
    return sorted(path.lstrip("/") for path in paths)


@pytest.mark.parametrize("path", ["folder", "folder/deep", "folder/one.csv", "empty", "odd"])
def test_ls_lists_what_fsspec_does(fs: RangeFileSystem, model: MemoryFileSystem, root: str, path: str) -> None:
    assert fs.ls(f"{root}/{path}", detail=False) == of_model(model.ls(f"{root}/{path}", detail=False))
    for info in fs.ls(f"s3://{root}/{path}/"):
        expected = model.info(info["name"])
        assert (info["type"], info["size"]) == (expected["type"], expected["size"])
        assert info == fs.info(info["name"]), "a listing tells what a HEAD does"


@pytest.mark.parametrize("arguments", [{}, {"withdirs": True}, {"maxdepth": 1}, {"maxdepth": 2, "withdirs": True}])
@pytest.mark.parametrize("path", ["folder", "folder/deep", "folder/one.csv", "missing", "fold"])
def test_find_finds_what_fsspec_does(
    fs: RangeFileSystem, model: MemoryFileSystem, root: str, path: str, arguments: dict[str, Any]
) -> None:
    assert fs.find(f"{root}/{path}", **arguments) == of_model(model.find(f"{root}/{path}", **arguments))
    detail = fs.find(f"{root}/{path}", detail=True, **arguments)
    assert [*detail] == of_model(model.find(f"{root}/{path}", **arguments))
    assert all(info["name"] == name for name, info in detail.items() if info)


@pytest.mark.parametrize(
    "pattern",
    [
        "folder/*",
        "folder/*.csv",
        "folder/**",
        "**/*.txt",
        "fold*/*.txt",
        "folder/t?o.csv",
        "folder/[a-o]*",
        "*/deep/",
        "none*",
    ],
)
def test_glob_matches_what_fsspec_does(fs: RangeFileSystem, model: MemoryFileSystem, root: str, pattern: str) -> None:
    assert sorted(fs.glob(f"{root}/{pattern}")) == of_model(model.glob(f"{root}/{pattern}"))


def test_walk_and_du_go_through_what_fsspec_does(fs: RangeFileSystem, model: MemoryFileSystem, root: str) -> None:
    walked = [(path, sorted(folders), sorted(files)) for path, folders, files in fs.walk(f"{root}/folder")]
    expected = [
        (path.lstrip("/"), sorted(folders), sorted(files)) for path, folders, files in model.walk(f"{root}/folder")
    ]
    assert sorted(walked) == sorted(expected)
    assert fs.du(f"{root}/folder") == model.du(f"{root}/folder")


def test_find_takes_one_request_and_one_a_thousand(fs: RangeFileSystem, root: str, s3_server: S3Server) -> None:
    seen = len(s3_server.requests)
    assert len(fs.find(root)) == len(FILES)
    assert len(s3_server.requests) == seen + 1


def test_file_and_folder_of_one_name_are_both_there(fs: RangeFileSystem, root: str) -> None:
    assert fs.info(f"{root}/same")["type"] == "file"
    assert fs.ls(f"{root}/same", detail=False) == [f"{root}/same/name"]
    assert fs.cat(f"{root}/same") == b"a file"
    assert {f"{root}/same", f"{root}/same/name"} < {*fs.find(root)}


def test_folder_that_was_made_by_hand_is_no_file(fs: RangeFileSystem, bucket: str) -> None:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="made/", Body=b"")
    client.close()
    assert fs.ls(bucket, detail=False) == [f"{bucket}/made"]
    assert fs.isdir(f"{bucket}/made")
    assert fs.ls(f"{bucket}/made") == []
    assert fs.find(bucket) == []
    assert fs.find(bucket, withdirs=True) == [bucket, f"{bucket}/made"]


def test_info_tells_what_is_there(fs: RangeFileSystem, root: str) -> None:
    info = fs.info(f"mpreader://{root}/data.bin")
    assert (info["name"], info["size"], info["type"]) == (f"{root}/data.bin", 300_000, "file")
    assert fs.size(f"{root}/data.bin") == 300_000
    assert info["LastModified"] == fs.modified(f"{root}/data.bin") == fs.created(f"{root}/data.bin")
    age = datetime.datetime.now(datetime.timezone.utc) - fs.modified(f"{root}/data.bin")
    assert datetime.timedelta(0) <= age < datetime.timedelta(hours=1)
    assert fs.info(root)["type"] == fs.info(f"{root}/folder/")["type"] == "directory"
    assert (fs.isfile(f"{root}/folder"), fs.isdir(f"{root}/folder"), fs.isdir(f"{root}/empty")) == (False, True, False)
    assert [fs.exists(f"{root}/{path}") for path in ("folder", "empty", "fold", "none")] == [True, True, False, False]
    with pytest.raises(FileNotFoundError):
        fs.info(f"{root}/fold")
    with pytest.raises(IsADirectoryError):
        fs.modified(f"{root}/folder")


def test_bucket_that_is_not_there_has_nothing_in_it(fs: RangeFileSystem) -> None:
    assert not fs.exists("no-such-bucket-at-all")
    assert not fs.exists("no-such-bucket-at-all/key")
    assert fs.find("no-such-bucket-at-all") == fs.glob("no-such-bucket-at-all/*") == []
    with pytest.raises(FileNotFoundError):
        fs.ls("no-such-bucket-at-all")
    with pytest.raises(ConfigError, match="name a bucket"):
        fs.ls("")


def test_exists_does_not_take_a_refusal_for_a_no(
    fs: RangeFileSystem, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(PermissionError):
        fs.exists(f"{root}/data.bin")


def test_checksum_and_ukey_change_with_the_content(fs: RangeFileSystem, bucket: str) -> None:
    client = boto3.client("s3")
    seen = []
    for content in (b"one", b"two", b"one"):
        client.put_object(Bucket=bucket, Key="file", Body=content)
        seen.append((fs.checksum(f"{bucket}/file"), fs.ukey(f"{bucket}/file")))
    client.close()
    assert seen[0] == seen[2]
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


# -- it only reads

WRITES: dict[str, Callable[[RangeFileSystem, str], object]] = {
    "open w": lambda fs, path: fs.open(path, "wb"),
    "open text": lambda fs, path: fs.open(path, "w"),
    "open a": lambda fs, path: fs.open(path, "ab"),
    "open x": lambda fs, path: fs.open(path, "xb"),
    "open +": lambda fs, path: fs.open(path, "r+b"),
    "touch": lambda fs, path: fs.touch(path),
    "touch without truncate": lambda fs, path: fs.touch(path, truncate=False),
    "rm": lambda fs, path: fs.rm(path),
    "rm recursive": lambda fs, path: fs.rm(path, recursive=True),
    "rm_file": lambda fs, path: fs.rm_file(path),
    "delete": lambda fs, path: fs.delete(path),
    "mkdir": lambda fs, path: fs.mkdir(path),
    "makedir": lambda fs, path: fs.makedir(path),
    "makedirs": lambda fs, path: fs.makedirs(path, exist_ok=True),
    "rmdir": lambda fs, path: fs.rmdir(path),
    "cp": lambda fs, path: fs.cp(path, f"{path}2"),
    "cp_file": lambda fs, path: fs.cp_file(path, f"{path}2"),
    "mv": lambda fs, path: fs.mv(path, f"{path}2"),
    "rename": lambda fs, path: fs.rename(path, f"{path}2"),
    "pipe": lambda fs, path: fs.pipe(path, b"x"),
    "pipe many": lambda fs, path: fs.pipe({path: b"x"}),
    "pipe_file": lambda fs, path: fs.pipe_file(path, b"x"),
    "put": lambda fs, path: fs.put(__file__, path),
    "put_file": lambda fs, path: fs.put_file(__file__, path),
    "upload": lambda fs, path: fs.upload(__file__, path),
    "write_bytes": lambda fs, path: fs.write_bytes(path, b"x"),
    "write_text": lambda fs, path: fs.write_text(path, "x"),
    "mapper": lambda fs, path: fs.get_mapper(path).__setitem__("key", b"x"),
    "_rm": lambda fs, path: asyncio.run(fs._rm(path, recursive=True)),
    "_rm_file": lambda fs, path: asyncio.run(fs._rm_file(path)),
    "_mkdir": lambda fs, path: asyncio.run(fs._mkdir(path)),
    "_makedirs": lambda fs, path: asyncio.run(fs._makedirs(path, exist_ok=True)),
    "_copy": lambda fs, path: asyncio.run(fs._copy(path, f"{path}2")),
    "_cp_file": lambda fs, path: asyncio.run(fs._cp_file(path, f"{path}2")),
    "_mv_file": lambda fs, path: asyncio.run(fs._mv_file(path, f"{path}2")),
    "_put": lambda fs, path: asyncio.run(fs._put(path, path)),
    "_put_file": lambda fs, path: asyncio.run(fs._put_file(path, path)),
    "_pipe": lambda fs, path: asyncio.run(fs._pipe(path, b"x")),
    "_pipe_file": lambda fs, path: asyncio.run(fs._pipe_file(path, b"x")),
}


@pytest.mark.parametrize("what", WRITES)
def test_writing_is_refused(fs: RangeFileSystem, root: str, s3_server: S3Server, what: str) -> None:
    seen = len(s3_server.requests)
    with pytest.raises(OSError, match="only reads") as caught:
        WRITES[what](fs, f"{root}/data.bin")
    assert caught.value.errno == errno.EROFS
    assert len(s3_server.requests) == seen


def test_no_method_of_fsspec_that_writes_is_left_out() -> None:
    harmless = {"start_transaction", "end_transaction", "transaction_type"}
    verbs = (
        "write",
        "put",
        "pipe",
        "rm",
        "mk",
        "make",
        "touch",
        "cp",
        "copy",
        "mv",
        "move",
        "rename",
        "delete",
        "upload",
    )
    known = {name.split()[0] for name in WRITES} | {"mkdirs", "copy", "move", "delete"}
    writing = {name for name in dir(RangeFileSystem) if name.lstrip("_").startswith(verbs)} - harmless
    assert writing - known - {"makedir"} == set()


# -- instances


def test_registered_protocols_lead_here(root: str, fs: RangeFileSystem) -> None:
    assert type(fsspec.filesystem("mpreader")) is RangeFileSystem
    with fsspec.open(f"mpreader://{root}/folder/one.csv", "rt") as file:
        assert file.read() == "a,b\n1,2\n"
    with pytest.MonkeyPatch.context() as patch:
        registered = importlib.import_module("fsspec.registry")._registry
        patch.setitem(registered, "s3", RangeFileSystem)  # to be undone, what follows can't be
        fsspec.register_implementation("s3", RangeFileSystem, clobber=True)
        made, path = fsspec.core.url_to_fs(f"s3://{root}/data.bin", anon=False)
        assert (type(made), path) == (RangeFileSystem, f"{root}/data.bin")
        assert fsspec.get_mapper(f"s3://{root}/folder")["one.csv"] == b"a,b\n1,2\n"


def test_mapper_gives_many_values_at_once(fs: RangeFileSystem, root: str) -> None:
    mapper = fs.get_mapper(f"{root}/folder")
    assert sorted(mapper) == ["deep/er/four.txt", "deep/three.txt", "one.csv", "two.csv"]
    assert mapper.getitems(["one.csv", "two.csv", "no"], on_error="omit") == {
        "one.csv": b"a,b\n1,2\n",
        "two.csv": b"a,b\n3,4\n",
    }
    with pytest.raises(KeyError):
        mapper["no"]


def arguments_of_session(leader: int) -> Iterator[bytes]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if os.getsid(int(process.name)) == leader:
                yield (process / "cmdline").read_bytes()


PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
import fsspec
assert "mpreader" not in sys.modules
with fsspec.open(sys.argv[1]) as file:
    print(len(file.read()))
print(fsspec.filesystem("mpreader").cat_file(sys.argv[1], -4).hex())
"""


def test_program_reads_by_the_entry_point_and_leaves_nothing_at_exit(root: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, f"mpreader://{root}/data.bin"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.split() == ["300000", FILES["data.bin"][-4:].hex()]
    assert not [arguments for arguments in arguments_of_session(process.pid) if b"mpreader" in arguments]


def test_settings_reach_the_client(s3_server: S3Server, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    fs = RangeFileSystem(S3ClientConfig(max_attempts=3), CONFIG, endpoint_url=s3_server.endpoint_url, anon=True)
    with pytest.raises(PermissionError):  # nothing was signed
        fs.cat_file(f"{root}/empty")
    config = fs._reader.client().s3client_config
    assert (config.max_attempts, config.endpoint_url, config.unsigned) == (3, s3_server.endpoint_url, True)
    assert json.loads(RangeFileSystem(endpoint_url=s3_server.endpoint_url).to_json())["protocol"] == "mpreader"
    fs.close()
    RangeFileSystem.clear_instance_cache()


def test_equal_settings_give_one_instance_and_pickles_find_it(fs: RangeFileSystem, root: str) -> None:
    assert RangeFileSystem(pool_config=CONFIG) is fs
    assert RangeFileSystem(pool_config=CONFIG, region="eu-west-1") is not fs
    assert pickle.loads(pickle.dumps(fs)) is fs
    fresh = pickle.loads(pickle.dumps(RangeFileSystem(pool_config=CONFIG, skip_instance_cache=True)))
    assert fresh.cat_file(f"{root}/empty") == b""


def test_threads_share_one_pool(fs: RangeFileSystem, root: str) -> None:
    from mpreader.pool.pool import _shared

    contents: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: contents.append(RangeFileSystem(pool_config=CONFIG).cat_file(f"{root}/data.bin"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [FILES["data.bin"]] * 4
    assert len(_shared) == 1


def test_closed_file_system_has_no_process_and_begins_anew(fs: RangeFileSystem, root: str) -> None:
    from mpreader.pool.pool import _shared

    assert fs.cat_file(f"{root}/data.bin", 0, 5) == FILES["data.bin"][:5]
    assert [pool.is_running for pool in _shared.values()] == [True]
    fs.close()
    fs.close()
    assert [pool.is_running for pool in _shared.values()] == [False]
    assert fs.cat_file(f"{root}/data.bin", 0, 5) == FILES["data.bin"][:5]


def test_forked_child_reads_by_itself(fs: RangeFileSystem, root: str) -> None:
    assert fs.cat_file(f"{root}/data.bin", 0, 5) == FILES["data.bin"][:5]
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = fs.cat_file(f"{root}/data.bin") == FILES["data.bin"]
            fs.close()
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert fs.cat_file(f"{root}/data.bin", 5, 9) == FILES["data.bin"][5:9]
