"""Names of the file system: all listings agree with one another and with the keys, whatever the keys are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader import ObjectMissing
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.s3.objects import ListObjectsPage, ObjectInfo


class Keys:
    """Client of a service that has one object of one byte for each key, and lists three names on a page."""

    def __init__(self, keys: set[str]) -> None:
        self._keys = sorted(keys)
        self.listed: list[str] = []

    def call(self, operation: str, bucket: str) -> None:
        assert operation == "head_bucket"

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        if key not in self._keys:
            raise ObjectMissing(f"no {key}")
        return ObjectInfo(key, 1, '"etag"', 1, "STANDARD")

    def list_objects(
        self, bucket: str, prefix: str = "", delimiter: str = "", max_keys: int = 3
    ) -> Iterator[ListObjectsPage]:
        self.listed.append(prefix)
        names: dict[str, bool] = {}  # key or common prefix, and whether it is a common prefix
        for key in self._keys:
            if key.startswith(prefix):
                inner, found, _ = key[len(prefix) :].partition(delimiter or "\0")
                names[prefix + inner + found if found else key] = bool(found)
        pages = [[*names.items()][at : at + max_keys] for at in range(0, max(1, len(names)), max_keys)]
        for page in pages:
            yield ListObjectsPage(
                tuple(self.head_object(bucket, name) for name, is_prefix in page if not is_prefix),
                tuple(name for name, is_prefix in page if is_prefix),
            )


def file_system(keys: set[str], **options: Any) -> RangeFileSystem:
    fs = RangeFileSystem(**{"skip_instance_cache": True, **options})
    client = Keys(keys)
    fs._reader.client = lambda: client  # type: ignore[method-assign,assignment,return-value]
    return fs


@given(keys=st.sets(st.text("ab/", min_size=1, max_size=5), max_size=8), cached=st.booleans())
def test_listings_agree_whatever_the_keys_are(keys: set[str], cached: bool) -> None:
    fs = file_system(keys, use_listings_cache=cached)
    files = sorted(f"bucket/{key}" for key in keys if key[-1] != "/")
    assert fs.find("bucket") == fs.find("bucket", maxdepth=9) == files
    assert sorted(f"{path}/{name}" for path, _, found in fs.walk("bucket") for name in found) == files
    flat, levels = (fs.find("bucket", depth, withdirs=True, detail=True) for depth in (None, 9))
    assert flat == levels
    assert sorted(fs.glob("bucket/**")) == sorted({*flat, "bucket"} if flat else [])
    for name, info in flat.items():
        assert fs.info(name) == info
        assert fs.isdir(name) is (info["type"] == "directory")
        below = [each for each in files if each.startswith(f"{name}/")]
        assert fs.find(name) == fs.find(name, maxdepth=9) == below or (below == [] and fs.find(name) == [name])
        assert [each["name"] for each in fs.ls(name)] == sorted({each["name"] for each in fs.ls(name)})
    assert {each["name"] for name in flat for each in fs.ls(name) if name != each["name"]} == {*flat} - {"bucket"}


TRAINING = ("train-0", "train-1", "train/2", "train/deep/3", "test-0", "trainer", "x/train-9", "train-dir/y/z")


def depth(name: str) -> int:
    return name.count("/") + 1


@pytest.mark.parametrize(
    "prefix", [None, "", "train", "train-", "train/", "train/d", "train/deep/3", "x/train", "no", "t"]
)
@pytest.mark.parametrize("maxdepth", [None, 1, 2, 3])
@pytest.mark.parametrize("folder", ["", "/d"])
def test_find_lists_what_begins_with_the_prefix(prefix: str | None, maxdepth: int | None, folder: str) -> None:
    root = f"bucket{folder}"
    fs = file_system({f"{folder}/{name}"[1:] for name in TRAINING} | {"d-not/train"} if folder else {*TRAINING})
    files = {name for name in TRAINING if name.startswith(prefix or "") and depth(name) <= (maxdepth or 99)}
    assert fs.find(root, maxdepth, prefix=prefix) == sorted(f"{root}/{name}" for name in files)
    parents = {"/".join(name.split("/")[:n]) for name in TRAINING for n in range(1, depth(name))}
    folders = {name for name in parents if name.startswith(prefix or "") and depth(name) <= (maxdepth or 99)}
    expected = {f"{root}/{name}" for name in files | folders} | ({root} if not prefix else set())
    detail = fs.find(f"mpreader://{root}/", maxdepth, True, True, prefix=prefix)
    assert [*detail] == sorted(expected)
    assert all(detail[f"{root}/{name}"]["type"] == "directory" for name in folders)
    assert all(detail[f"{root}/{name}"] == fs.info(f"{root}/{name}") for name in files)


@pytest.mark.parametrize(("maxdepth", "listed"), [(None, ["d/train-"]), (2, ["d/train-", "d/train-dir/"])])
def test_find_has_the_service_select_by_the_prefix(maxdepth: int | None, listed: list[str]) -> None:
    fs = file_system({f"d/{name}" for name in TRAINING})
    fs.find("bucket/d", maxdepth, prefix="train-")
    client: Any = fs._reader.client()
    assert client.listed == listed


@pytest.mark.parametrize("maxdepth", [0, -1])
def test_depth_below_one_is_refused(maxdepth: int) -> None:
    fs = file_system(set())
    for call in (fs.find, fs.glob, fs.du, lambda path, maxdepth: [*fs.walk(path, maxdepth)]):
        with pytest.raises(ValueError, match="maxdepth must be at least 1"):
            call("bucket", maxdepth=maxdepth)
    with pytest.raises(ValueError, match="begins with 'x'"):
        fs.find("https://localhost/a", prefix="x")
