"""Programs that read through fsspec: they find the file system by its URL, and read what was stored."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest

from mpreader import ObjectChanged, PoolConfig, S3ClientConfig
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.testing import S3Server
from tests.integration.fsspec.conftest import Fill, MakeFileSystem

pytestmark = pytest.mark.timeout(90)


def upload(folder: Path, bucket: str) -> None:
    with contextlib.closing(boto3.client("s3")) as client:
        for root, _, files in os.walk(folder):
            for name in files:
                path = Path(root, name)
                client.upload_file(str(path), bucket, str(path.relative_to(folder)))


@pytest.fixture(scope="module", autouse=True)
def loop_of_fsspec() -> Any:
    return importlib.import_module("fsspec.asyn").get_loop()  # made once for each process, and stays


@pytest.fixture
def as_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system is registered for s3:// URLs, in place of s3fs."""
    registered = importlib.import_module("fsspec.registry")._registry
    monkeypatch.setitem(registered, "s3", RangeFileSystem)  # to be undone, what follows can't be
    fsspec.register_implementation("s3", RangeFileSystem, clobber=True)


# -- zarr

NUMBERS = np.arange(64 * 50, dtype="int32").reshape(64, 50)


@pytest.fixture(scope="module")
def zarr() -> Any:
    zarr = pytest.importorskip("zarr", minversion="3", reason="zarr 3 is not installed; it needs Python 3.11")
    # Starts zarr's loop and threads, which stay.
    zarr.open(zarr.storage.MemoryStore(), mode="w", shape=1, dtype="u1")
    return zarr


@pytest.fixture(scope="module")
def stored(zarr: Any, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with groups and arrays of zarr."""
    folder = tmp_path_factory.mktemp("zarr")
    for name, version in (("three", 3), ("two", 2), ("consolidated", 3)):
        root = zarr.open_group(folder / name, mode="w", zarr_format=version)
        root.create_array("plain", data=NUMBERS, chunks=(10, 20))
        root.create_group("inner").create_array("deep", data=NUMBERS[0])
        root.attrs["about"] = "numbers"
        if version == 3:
            root.create_array("sharded", data=NUMBERS, chunks=(8, 5), shards=(32, 25))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # consolidated metadata are not in the specification yet
        zarr.consolidate_metadata(folder / "consolidated")
    s3_server.create_bucket("for-zarr")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in s3_server.environment().items():
            patch.setenv(variable, value)
        upload(folder, "for-zarr")
    return "mpreader://for-zarr"


@pytest.fixture(autouse=True)
def closed_file_systems(aws_environment: None) -> Iterator[None]:
    yield
    for fs in RangeFileSystem._cache.values():  # those that programs have made
        fs.close()
    RangeFileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", ["three", "two", "consolidated"])
@pytest.mark.parametrize("mode", ["r", "r+", "a", None])
def test_zarr_opens_a_group_by_its_url(zarr: Any, stored: str, name: str, mode: str | None) -> None:
    root = zarr.open(f"{stored}/{name}", **({} if mode is None else {"mode": mode}))
    assert root.attrs["about"] == "numbers"
    assert {member for member, _ in root.members(max_depth=None)} >= {"plain", "inner", "inner/deep"}
    assert (root["plain"][:] == NUMBERS).all()
    assert (root["inner/deep"][5:9] == NUMBERS[0, 5:9]).all()
    assert "none" not in root


def test_zarr_opens_arrays_and_reads_parts_of_shards(zarr: Any, stored: str) -> None:
    assert (zarr.open_array(f"{stored}/three/plain", mode="r")[3:33:7, 15:] == NUMBERS[3:33:7, 15:]).all()
    sharded = zarr.open_array(f"{stored}/three/sharded", mode="r")
    assert (sharded[:] == NUMBERS).all()
    assert (sharded[30:40, 20:30] == NUMBERS[30:40, 20:30]).all()
    root = zarr.open_consolidated(f"{stored}/consolidated")
    assert (root["sharded"][5] == NUMBERS[5]).all()


@pytest.mark.skipif(not hasattr(fsspec.AbstractFileSystem, "to_dict"), reason="this fsspec has no to_dict")
def test_zarr_takes_options_a_file_system_and_a_mapping(zarr: Any, stored: str, s3_server: S3Server) -> None:
    options = {"endpoint_url": s3_server.endpoint_url, "batch_size": 2, "use_listings_cache": True}
    assert zarr.open(f"{stored}/three", mode="r", storage_options=options)["plain"][1, 1] == NUMBERS[1, 1]
    made = RangeFileSystem(S3ClientConfig(max_attempts=3), PoolConfig(workers=1), asynchronous=True)
    store = zarr.storage.FsspecStore(made, read_only=True, path="for-zarr/three")
    assert zarr.open_group(store, mode="r")["plain"][2, 2] == NUMBERS[2, 2]
    # zarr makes an asynchronous file system of the same settings.
    mapping = RangeFileSystem(S3ClientConfig(max_attempts=3), PoolConfig(workers=1)).get_mapper("for-zarr/three")
    store = zarr.storage.FsspecStore.from_mapper(mapping, read_only=True)
    assert store.fs.asynchronous
    assert zarr.open_group(store, mode="r")["plain"][3, 3] == NUMBERS[3, 3]


def test_zarr_is_told_what_is_missing_and_what_can_not_be_written(zarr: Any, stored: str) -> None:
    with pytest.raises(FileNotFoundError):
        zarr.open(f"{stored}/none", mode="r")
    with pytest.raises(OSError, match="only reads"):
        zarr.open(f"{stored}/new", mode="w", shape=3, dtype="i4")
    with pytest.raises(OSError, match="only reads"):
        zarr.open(f"{stored}/three", mode="r+")["plain"][0, 0] = 1


def test_zarr_reads_s3_urls_where_it_is_registered_for_them(zarr: Any, stored: str, as_s3: None) -> None:
    root = zarr.open("s3://for-zarr/three", mode="r")
    assert type(root.store.fs) is RangeFileSystem
    assert (root["sharded"][:] == NUMBERS).all()


def test_xarray_opens_a_dataset(zarr: Any, bucket: str, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray", reason="xarray is not installed")
    dataset = xarray.Dataset({"n": (("x", "y"), NUMBERS)}, coords={"x": np.arange(64)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.to_zarr(tmp_path / "set.zarr")
        upload(tmp_path, bucket)
        assert xarray.open_zarr(f"mpreader://{bucket}/set.zarr", chunks=None).load().equals(dataset)


# -- universal_pathlib, dask, fsspec's own


@pytest.mark.parametrize("protocol", ["mpreader", "s3"])
@pytest.mark.filterwarnings("ignore:UPath 'mpreader' filesystem not explicitly implemented")
def test_universal_path_reads_lists_and_copies(
    as_s3: None, bucket: str, fill: Fill, tmp_path: Path, protocol: str, s3_server: S3Server
) -> None:
    upath = pytest.importorskip("upath", reason="universal_pathlib is not installed")
    fill({"d/one.txt": b"1", "d/sub/two.txt": b"22", "d/x": b"", "d/x/0": b"0"})
    root = upath.UPath(f"{protocol}://{bucket}/d", endpoint_url=s3_server.endpoint_url, anon=False)
    assert type(root.fs) is RangeFileSystem
    one = root / "one.txt"
    assert (one.read_bytes(), one.read_text(), one.stat().st_size) == (b"1", "1", 1)
    assert (one.exists(), one.is_file(), one.is_dir(), (root / "none").exists()) == (True, True, False, False)
    assert (root.is_dir(), (root / "sub").is_dir()) == (True, True)
    assert sorted(path.name for path in root.iterdir()) == ["one.txt", "sub", "x"]
    assert sorted(path.name for path in root.glob("**/*.txt")) == ["one.txt", "two.txt"]
    assert sorted(path.name for path in root.rglob("*.txt")) == ["one.txt", "two.txt"]
    with one.open("rt") as file:
        assert file.read() == "1"
    one.copy(upath.UPath(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == b"1"
    with pytest.raises(OSError, match="only reads"):
        one.write_bytes(b"2")


def test_dask_reads_blocks(bucket: str, fill: Fill) -> None:
    bag = pytest.importorskip("dask.bag", reason="dask is not installed")
    lines = [f"line {number}" for number in range(2000)]
    fill({"text-0": "\n".join(lines[:1000]).encode(), "text-1": "\n".join(lines[1000:]).encode()})
    read = bag.read_text(f"mpreader://{bucket}/text-*", blocksize=1000, linedelimiter="\n")
    assert [line.strip() for line in read.compute(scheduler="sync")] == lines


def test_caches_references_and_folders_of_fsspec_read_through_it(bucket: str, fill: Fill, tmp_path: Path) -> None:
    fill({"d/one": b"0123456789", "d/two": b"two"})
    for cache in ("simplecache", "filecache"):
        options = {cache: {"cache_storage": str(tmp_path / cache)}}
        with fsspec.open(f"{cache}::mpreader://{bucket}/d/one", **options) as file:
            assert file.read() == b"0123456789"
    references = {"a": [f"mpreader://{bucket}/d/one", 2, 3], "b": [f"mpreader://{bucket}/d/two"], "c": "text"}
    filesystem = fsspec.filesystem("reference", fo={"version": 1, "refs": references}, remote_protocol="mpreader")
    assert filesystem.cat(["a", "b", "c"]) == {"a": b"234", "b": b"two", "c": b"text"}
    inner = fsspec.filesystem("dir", path=f"{bucket}/d", target_protocol="mpreader")
    assert sorted(inner.ls("", detail=False)) == ["one", "two"]


# -- asynchronous methods


def test_asynchronous_methods_do_what_the_others_do(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path
) -> None:
    fill({"d/one": b"1", "d/two": b"22", "d/sub/three": b"333", "d/x": b"", "d/x/0": b"0"})
    fs, path = make_fs(asynchronous=True), f"{bucket}/d"
    one = f"{path}/one"

    async def main() -> None:
        assert await fs._info(one) == fs.info(one)
        assert await fs._ls(path) == fs.ls(path)
        assert await fs._ls(path, detail=False) == fs.ls(path, detail=False)
        assert await fs._find(path, prefix="s") == [f"{path}/sub/three"]
        assert await fs._find(path, withdirs=True, detail=True) == fs.find(path, withdirs=True, detail=True)
        assert await fs._glob(f"{path}/*") == fs.glob(f"{path}/*")
        assert await fs._du(path) == 7
        assert await fs._expand_path(path, recursive=True) == fs.expand_path(path, recursive=True)
        for name, answers in (("one", [True, True, False]), ("sub", [True, False, True]), ("no", [False] * 3)):
            assert [await call(f"{path}/{name}") for call in (fs._exists, fs._isfile, fs._isdir)] == answers
        assert (await fs._size(one), await fs._sizes([one, f"{path}/two"])) == (1, [1, 2])
        assert [step async for step in fs._walk(path)] == [*fs.walk(path)]
        assert await fs._cat_file(f"{path}/two", 1, None) == b"2"
        assert await fs._cat_ranges([one, f"{path}/none"], 0, 1, on_error="return", batch_size=1) is not None
        assert await fs._cat(path, recursive=True) == fs.cat(path, recursive=True)
        await fs._get_file(one, str(tmp_path / "one"))
        await fs._get(path, str(tmp_path / "copy"), recursive=True)
        with pytest.raises(FileNotFoundError):
            await fs._cat_file(f"{path}/none")
        with pytest.raises(FileNotFoundError):
            [step async for step in fs._walk(f"{path}/none", on_error="raise")]

    asyncio.run(main())
    assert (tmp_path / "one").read_bytes() == b"1"
    assert (tmp_path / "copy" / "sub" / "three").read_bytes() == b"333"


def test_file_of_open_async_reads_one_version(make_fs: MakeFileSystem, bucket: str, fill: Fill) -> None:
    fill({"file": b"0123456789"})
    fs = make_fs(asynchronous=True)

    async def main() -> None:
        async with await fs.open_async(f"mpreader://{bucket}/file") as file:
            assert (file.size, await file.read(3), await file.read(4), file.tell()) == (10, b"012", b"3456", 7)
            file.seek(2)
            assert await file.read(100) == b"23456789"
            assert await file.read() == b""
            file.seek(0)
            fill({"file": b"9876543210"})
            with pytest.raises(ObjectChanged):
                await file.read()
        with pytest.raises(ValueError, match="closed"):
            await file.read()
        with pytest.raises(ValueError, match="mode"):
            await fs.open_async(f"{bucket}/file", "r")
        with pytest.raises(OSError, match="only reads"):
            await fs.open_async(f"{bucket}/file", "wb")
        with pytest.raises(FileNotFoundError):
            await fs.open_async(f"{bucket}/none")

    asyncio.run(main())


def test_asynchronous_calls_run_beside_one_another_and_after_a_close(
    make_fs: MakeFileSystem, bucket: str, fill: Fill
) -> None:
    fill({f"file{number}": str(number).encode() for number in range(8)})
    fs = make_fs(asynchronous=True, batch_size=4)

    async def main() -> list[Any]:
        return await asyncio.gather(*(fs._cat_file(f"{bucket}/file{number}") for number in range(8)))

    for _ in range(2):
        assert asyncio.run(main()) == [str(number).encode() for number in range(8)]
        fs.close()


def test_asynchronous_methods_work_in_a_forked_child(make_fs: MakeFileSystem, bucket: str, fill: Fill) -> None:
    fill({"file": b"content"})
    fs = make_fs()
    assert asyncio.run(fs._cat_file(f"{bucket}/file")) == b"content"
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = asyncio.run(fs._cat_file(f"{bucket}/file")) == b"content"
            fs.close()
        finally:
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
