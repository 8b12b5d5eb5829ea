"""Options of the file system: those of fsspec are taken and do what they say, others are refused everywhere."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.asyn import get_loop

from mpreader import ConfigError, PoolConfig, S3ClientConfig
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.testing import S3Server
from tests.integration.fsspec.conftest import CONFIG, Fill, MakeFileSystem

pytestmark = pytest.mark.timeout(90)

OBJECTS = {"d/one": b"1", "d/two": b"22", "d/sub/three": b"333"}

# -- construction


@pytest.mark.parametrize(
    "options",
    [
        {"asynchronous": False},
        {"asynchronous": True},
        {"loop": None},
        {"batch_size": 10},
        {"batch_size": -1},
        {"use_listings_cache": False},
        {"use_listings_cache": True, "listings_expiry_time": 5.0, "max_paths": 3},
        {"listings_expiry_time": 5},
        {"max_paths": 5},
        {"skip_instance_cache": True},
    ],
)
def test_option_of_fsspec_is_taken(make_fs: MakeFileSystem, bucket: str, fill: Fill, options: dict[str, Any]) -> None:
    fill(OBJECTS)
    fs = fsspec.filesystem("mpreader", **options)
    assert fs.cat_file(f"{bucket}/d/two") == b"22"
    assert asyncio.run(fs._cat_file(f"{bucket}/d/two")) == b"22"
    assert fs.find(f"{bucket}/d") == [f"{bucket}/d/one", f"{bucket}/d/sub/three", f"{bucket}/d/two"]
    copy = pickle.loads(pickle.dumps(fs))
    assert copy.cat_file(f"{bucket}/d/one") == b"1"
    fs.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"unknown": 1}, TypeError),
        ({"listings_cache": True}, TypeError),
        ({"default_block_size": 5}, TypeError),
        ({"asynchronous": 1}, TypeError),
        ({"loop": "loop"}, TypeError),
        ({"batch_size": 0}, ConfigError),
        ({"batch_size": -2}, ConfigError),
        ({"batch_size": "4"}, ConfigError),
        ({"listings_expiry_time": -1}, ConfigError),
        ({"listings_expiry_time": "1"}, ConfigError),
        ({"use_listings_cache": "no"}, TypeError),
        ({"max_paths": 0}, ConfigError),
    ],
)
def test_wrong_option_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        fsspec.filesystem("mpreader", **options)


@pytest.fixture(scope="module")
def loop_of_fsspec() -> Any:
    return get_loop()  # for each process it is made once, with a thread, and stays


def test_asynchronous_and_loop_are_what_fsspec_makes_of_them(loop_of_fsspec: Any, make_fs: MakeFileSystem) -> None:
    assert make_fs().loop is loop_of_fsspec
    assert not make_fs().asynchronous
    assert make_fs(asynchronous=True).asynchronous
    assert make_fs(asynchronous=True).loop is None, "the caller's running loop"
    loop = asyncio.new_event_loop()
    fs = make_fs(loop=loop, skip_instance_cache=True)
    assert fs.loop is loop
    assert pickle.loads(pickle.dumps(fs)).loop is loop_of_fsspec, "a loop stays in its process"
    loop.close()


def test_file_system_starts_no_thread_before_it_is_used(make_fs: MakeFileSystem) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    make_fs(skip_instance_cache=True)
    assert {thread.ident for thread in threading.enumerate()} <= before


@pytest.mark.skipif(not hasattr(fsspec.AbstractFileSystem, "to_dict"), reason="this fsspec has no to_dict")
def test_json_of_a_file_system_has_its_settings(make_fs: MakeFileSystem, bucket: str, fill: Fill) -> None:
    fill(OBJECTS)
    fs = make_fs(s3client_config=S3ClientConfig(max_attempts=3), max_paths=7, loop=None, region=None)
    made = fsspec.AbstractFileSystem.from_json(fs.to_json())
    assert type(made) is RangeFileSystem
    assert made._reader.client().s3client_config.max_attempts == 3
    assert made.dircache.max_paths == 7
    assert made.cat_file(f"{bucket}/d/one") == b"1"
    assert json.loads(made.to_json()) == json.loads(fs.to_json())
    made.close()


def test_batch_size_bounds_the_files_of_one_call(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path, s3_server: S3Server
) -> None:
    names = [f"{bucket}/file{number}" for number in range(6)]
    fill({name.partition("/")[2]: name.encode() for name in names})
    cases: list[tuple[RangeFileSystem, dict[str, Any]]] = [(make_fs(batch_size=1), {}), (make_fs(), {"batch_size": 1})]
    for fs, options in cases:
        seen = len(s3_server.requests)
        assert fs.cat_ranges(names, 0, None, **options) == [name.encode() for name in names]
        # One file after the other: each HEAD is followed by the GET of the same file.
        methods = [request.method for request in s3_server.requests[seen:]]
        assert methods == ["HEAD", "GET"] * 6
        fs.get(names, str(tmp_path / "copies") + "/", **options)
        assert [(tmp_path / "copies" / f"file{number}").read_text() for number in range(6)] == names


# -- methods

CALLS: dict[str, Callable[[Any, str], object]] = {
    "cat": lambda fs, path: fs.cat(path, unknown=1),
    "cat_file": lambda fs, path: fs.cat_file(path, unknown=1),
    "cat_ranges": lambda fs, path: fs.cat_ranges([path], 0, 1, unknown=1),
    "read_bytes": lambda fs, path: fs.read_bytes(path, unknown=1),
    "read_text": lambda fs, path: fs.read_text(path, unknown=1),
    "open": lambda fs, path: fs.open(path, unknown=1),
    "open text": lambda fs, path: fs.open(path, "r", unknown=1),
    "get": lambda fs, path: fs.get(path, "/nowhere", unknown=1),
    "download": lambda fs, path: fs.download(path, "/nowhere", unknown=1),
    "get_file": lambda fs, path: fs.get_file(path, "/nowhere", unknown=1),
    "info": lambda fs, path: fs.info(path, unknown=1),
    "stat": lambda fs, path: fs.stat(path, unknown=1),
    "exists": lambda fs, path: fs.exists(path, unknown=1),
    "lexists": lambda fs, path: fs.lexists(path, unknown=1),
    "isfile": lambda fs, path: fs.isfile(path, unknown=1),
    "isdir": lambda fs, path: fs.isdir(path, unknown=1),
    "ls": lambda fs, path: fs.ls(path, unknown=1),
    "listdir": lambda fs, path: fs.listdir(path, unknown=1),
    "find": lambda fs, path: fs.find(path, unknown=1),
    "find by levels": lambda fs, path: fs.find(path, maxdepth=1, unknown=1),
    "walk": lambda fs, path: [*fs.walk(path, unknown=1)],
    "glob": lambda fs, path: fs.glob(path, unknown=1),
    "glob of a pattern": lambda fs, path: fs.glob(f"{path}*", unknown=1),
    "du": lambda fs, path: fs.du(path, unknown=1),
    "disk_usage": lambda fs, path: fs.disk_usage(path, unknown=1),
    "expand_path": lambda fs, path: fs.expand_path(path, unknown=1),
    "_cat_file": lambda fs, path: asyncio.run(fs._cat_file(path, unknown=1)),
    "_ls": lambda fs, path: asyncio.run(fs._ls(path, unknown=1)),
}


@pytest.mark.parametrize("what", CALLS)
def test_unknown_option_of_a_method_is_refused(make_fs: MakeFileSystem, bucket: str, fill: Fill, what: str) -> None:
    fill({"file": b"x"})
    with pytest.raises(TypeError, match="unexpected keyword argument 'unknown'"):
        CALLS[what](make_fs(), f"{bucket}/file")


def test_options_that_fsspec_documents_are_taken_by_each_method(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path
) -> None:
    fill(OBJECTS)
    fs, path = make_fs(), f"{bucket}/d"
    names = [f"{path}/one", f"{path}/sub/three", f"{path}/two"]
    assert fs.find(path, None, False, False, refresh=True) == names
    assert [*fs.find(path, detail=True)] == names
    assert fs.glob(f"{path}/*", maxdepth=1, detail=True, withdirs=False, refresh=True).keys() == {names[0], names[2]}
    assert fs.du(path, True, None, False, refresh=True) == 6
    assert fs.du(path, total=False, maxdepth=1, withdirs=True) == {path: 0, names[0]: 1, names[2]: 2, f"{path}/sub": 0}
    assert [step[0] for step in fs.walk(path, 1, False, "raise", detail=True, refresh=True)] == [path]
    assert fs.expand_path(path, True, 1, assume_literal=True) == [path, names[0], f"{path}/sub", names[2]]
    assert fs.cat(names, False, "return", start=0, end=1, batch_size=2) == dict(
        zip(names, (b"1", b"3", b"2"), strict=True)
    )
    assert fs.cat_ranges(names[:1], 0, 1, 0, "raise", batch_size=1) == [b"1"]
    fs.get(path, str(tmp_path / "copy"), True, maxdepth=2, batch_size=2)
    assert (tmp_path / "copy" / "sub" / "three").read_bytes() == b"333"
    fs.get_file(names[0], tmp_path / "one")
    with fs.open(names[2], "rb", 1000, None, None, cache_type="bytes", autocommit=True) as file:
        assert file.read() == b"22"
    with fs.open(names[2], "rt", encoding="utf-8", newline="\n", errors="strict", cache_options={}) as file:
        assert file.read() == "22"
    assert (fs.size(names[0]), fs.sizes(names)) == (1, [1, 3, 2])
    assert not hasattr(fs, "tree") or fs.tree(path)  # newer versions of fsspec have it
    with pytest.raises(ValueError, match="on_error must be one of"):
        fs.cat(names, on_error="ignore")
    with pytest.raises(ValueError, match="on_error must be one of"):
        fs.cat_ranges(names, 0, 1, on_error="omit")


# -- listings that are kept


def requests_of(server: S3Server, call: Callable[[], object]) -> int:
    seen = len(server.requests)
    call()
    return len(server.requests) - seen


LISTINGS: dict[str, Callable[[RangeFileSystem, str], Any]] = {
    "ls": lambda fs, path: fs.ls(path, detail=False),
    "find": lambda fs, path: fs.find(path),
    "find with folders": lambda fs, path: fs.find(path, withdirs=True),
    "find by levels": lambda fs, path: fs.find(path, maxdepth=2),
    "walk": lambda fs, path: [*fs.walk(path)],
    "glob": lambda fs, path: fs.glob(f"{path}/*"),
    "du": lambda fs, path: fs.du(path, total=False),
}


@pytest.mark.parametrize("what", LISTINGS)
@pytest.mark.parametrize("option", ["use_listings_cache", "listings_expiry_time", "max_paths"])
def test_listing_is_kept_if_that_is_asked_for(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, s3_server: S3Server, what: str, option: str
) -> None:
    fill(OBJECTS)
    call, path = LISTINGS[what], f"{bucket}/d"
    options = {"use_listings_cache": True, "listings_expiry_time": 1000, "max_paths": 100}
    fs = make_fs(**{option: options[option]})
    first = call(fs, path)
    fill({"d/new": b""})
    assert requests_of(s3_server, lambda: call(fs, path)) == 0
    assert call(fs, path) == first
    assert call(make_fs(), path) != first, "by default nothing is kept"
    assert call(make_fs(use_listings_cache=False, listings_expiry_time=1000), path) != first
    fs.invalidate_cache(f"{bucket}/elsewhere")
    assert call(fs, path) == first
    fs.invalidate_cache(f"{path}/sub/three")  # what is above it names it, too
    assert call(fs, path) != first


@pytest.mark.parametrize("where", [None, "", "/d", "/d/sub"])
def test_cache_is_invalidated_at_below_and_above_a_path(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, s3_server: S3Server, where: str | None
) -> None:
    fill(OBJECTS)
    fs = make_fs(use_listings_cache=True)
    for path in (bucket, f"{bucket}/d", f"{bucket}/d/sub"):
        fs.ls(path)
    fs.invalidate_cache(where if where is None else f"mpreader://{bucket}{where}")
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/d")) == 1
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/d/sub")) == 1


def test_refresh_asks_again_and_keeps_the_answer(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, s3_server: S3Server
) -> None:
    fill(OBJECTS)
    fs, path = make_fs(use_listings_cache=True), f"{bucket}/d"
    fs.ls(path)
    fill({"d/one": b"longer"})
    assert fs.info(f"{path}/one")["size"] == 1
    assert fs.info(f"{path}/one", refresh=True)["size"] == 6
    assert fs.ls(path, refresh=True)[0]["size"] == 6
    assert requests_of(s3_server, lambda: fs.ls(path)) == 0
    assert fs.info(f"{path}/one")["size"] == fs.size(f"{path}/one") == 6
    assert fs.exists(f"{path}/one", refresh=True)


def test_description_comes_from_a_kept_listing_and_bytes_never_do(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, s3_server: S3Server, tmp_path: Path
) -> None:
    fill(OBJECTS)
    fs, path = make_fs(use_listings_cache=True), f"{bucket}/d"
    [info, *_] = fs.ls(path)
    assert requests_of(s3_server, lambda: fs.info(f"{path}/one")) == 0
    assert fs.isfile(f"{path}/one")
    assert fs.isdir(f"{path}/sub")
    info["size"] = -1  # a copy: what the caller does to it does not change what is kept
    fs.info(f"{path}/one")["size"] = -1
    assert fs.info(f"{path}/one")["size"] == 1
    before = fs.ukey(f"{path}/one")
    fill({"d/one": b"another", "d/new": b"new"})
    assert fs.info(f"{path}/one")["size"] == 1
    assert fs.exists(f"{path}/new"), "what a kept listing does not name is asked for"
    assert fs.cat_file(f"{path}/one") == fs.cat(f"{path}/o*", recursive=True)[f"{path}/one"] == b"another"
    with fs.open(f"{path}/one") as file:
        assert (file.size, file.read()) == (7, b"another")
    fs.get(f"{path}/one", str(tmp_path / "one"))
    assert (tmp_path / "one").read_bytes() == b"another"
    assert fs.ukey(f"{path}/one") != before


def test_kept_listing_expires(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server
) -> None:
    fill(OBJECTS)
    fs, now = make_fs(listings_expiry_time=10), [1000.0]
    monkeypatch.setattr("fsspec.dircache.time.time", lambda: now[0])
    fs.ls(f"{bucket}/d")
    now[0] += 9
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/d")) == 0
    now[0] += 2
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/d")) == 1


def test_no_more_listings_are_kept_than_max_paths(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, s3_server: S3Server
) -> None:
    fill({f"folder{number}/file": b"" for number in range(4)})
    fs = make_fs(max_paths=2)
    for number in range(4):
        fs.ls(f"{bucket}/folder{number}")
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/folder3")) == 0
    assert requests_of(s3_server, lambda: fs.ls(f"{bucket}/folder0")) == 1


def test_settings_may_not_be_a_dict_of_a_user() -> None:
    with pytest.raises(TypeError, match="pool_config must be a PoolConfig"):
        RangeFileSystem(pool_config={"workers": 2})
    assert isinstance(CONFIG, PoolConfig)


def test_file_system_is_let_go_of_with_its_last_reference(aws_environment: None, bucket: str, fill: Fill) -> None:
    fill(OBJECTS)
    fs = RangeFileSystem(pool_config=CONFIG, skip_instance_cache=True)
    assert fs.find(f"{bucket}/d")
    assert asyncio.run(fs._cat_file(f"{bucket}/d/one")) == b"1"
    fs.close()
    let_go = weakref.ref(fs)
    del fs
    assert let_go() is None, "at once, not when the collector comes"
