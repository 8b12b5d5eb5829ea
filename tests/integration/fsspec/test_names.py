"""Names of the file system: prefixes, keys that are also folders, markers of folders, odd keys, and errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpreader import AccessDenied, PlanError, S3ClientConfig, TransportError
from mpreader.fsspec.filesystem import RangeFileSystem
from mpreader.testing import Fault, FaultKind, FaultServer
from tests.integration.fsspec.conftest import Fill, MakeFileSystem

pytestmark = pytest.mark.timeout(90)

# -- find(prefix=…)


@pytest.mark.parametrize("maxdepth", [None, 1])
def test_find_lists_what_begins_with_the_prefix(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, maxdepth: int | None
) -> None:
    fill(dict.fromkeys(("d/train-0", "d/train-1", "d/train/2", "d/test-0", "train-x"), b""))
    fs, path = make_fs(), f"{bucket}/d"
    files = [f"{path}/train-0", f"{path}/train-1"] + ([f"{path}/train/2"] if maxdepth is None else [])
    assert fs.find(path, maxdepth, prefix="train") == files
    assert {*fs.find(path, maxdepth, withdirs=True, detail=True, prefix="train")} == {*files, f"{path}/train"}


# -- a key that is also the name of a folder

SAME: dict[str, bytes] = {
    "d/x": b"",
    "d/x/0": b"0",
    "d/x/1": b"1",
    "d/x/1/2": b"2",
    "d/y": b"y",
    "d/z/": b"",
    "d/x-": b"-",
}


@pytest.mark.parametrize("content", [b"", b"bytes"])
def test_key_that_is_also_a_folder_is_one_file_with_files_below(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, content: bytes
) -> None:
    fill({**SAME, "d/x": content})
    fs, root = make_fs(), f"{bucket}/d"
    both = f"{root}/x"
    info = fs.info(both)
    assert (info["type"], info["size"]) == ("file", len(content))
    assert (fs.exists(both), fs.isfile(both), fs.isdir(both)) == (True, True, False)
    names = [f"{root}/{name}" for name in ("x", "x-", "x/0", "x/1", "x/1/2", "y")]
    for maxdepth in (None, 9):
        assert fs.find(root, maxdepth) == names
        found = fs.find(root, maxdepth, withdirs=True, detail=True)
        assert {name for name, each in found.items() if each["type"] == "directory"} == {root, f"{root}/z"}
        assert found[both] == info
        assert fs.find(both, maxdepth, withdirs=True, detail=True)[both] == info
        assert fs.find(both, maxdepth) == names[2:5]
    assert [each["name"] for each in fs.ls(root)] == [both, f"{root}/x-", f"{root}/y", f"{root}/z"]
    assert fs.ls(root)[0] == info
    assert fs.ls(both, detail=False) == names[2:4]
    walked = {path: (sorted(folders), sorted(files)) for path, folders, files in fs.walk(root)}
    assert walked == {
        root: (["x", "z"], ["x", "x-", "y"]),
        both: (["1"], ["0", "1"]),
        f"{both}/1": ([], ["2"]),
        f"{root}/z": ([], []),
    }
    assert fs.glob(f"{root}/*") == [both, f"{root}/x-", f"{root}/y", f"{root}/z"]
    assert fs.glob(f"{root}/**") == [root, *names, f"{root}/z"]
    assert fs.du(root) == len(content) + 5
    assert fs.cat(root, recursive=True) == {f"{bucket}/{key}": each for key, each in SAME.items() if key[-1] != "/"} | {
        both: content
    }
    assert [*fs.cat(both, recursive=True)] == [both, *names[2:5]]


def local_tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("where", ["d", "d/"])
def test_get_of_a_key_that_is_also_a_folder_copies_all(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path, where: str
) -> None:
    fill({**SAME, "d/x/1": b""})
    fs = make_fs()
    fs.get(f"{bucket}/{where}", str(tmp_path / "copy"), recursive=True)
    assert local_tree(tmp_path / "copy") == {
        "x": None,
        "x/0": b"0",
        "x/1": None,
        "x/1/2": b"2",
        "x-": b"-",
        "y": b"y",
        "z": None,
    }
    fs.get(f"{bucket}/d/x", str(tmp_path / "of x"), recursive=True)
    assert local_tree(tmp_path / "of x") == {"0": b"0", "1": None, "1/2": b"2"}


def test_get_names_what_a_disk_can_not_have_and_copies_the_rest(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path
) -> None:
    fill({**SAME, "d/x": b"bytes", "d/x/1": b""})
    fs = make_fs()
    with pytest.raises(FileExistsError, match="everything else was copied") as caught:
        fs.get(f"{bucket}/d", str(tmp_path / "copy"), recursive=True)
    assert caught.value.filename == f"{bucket}/d/x"
    assert local_tree(tmp_path / "copy")["x/0"] == b"0"
    assert len(local_tree(tmp_path / "copy")) == 7
    fs.get_file(f"{bucket}/d/x", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b"bytes"
    fill({"e//x": b"1", "e/x": b"2"})
    with pytest.raises(FileExistsError, match="its local path"):
        fs.get(f"{bucket}/e", str(tmp_path / "slashes"), recursive=True)


def test_get_that_fails_leaves_no_part_of_a_file(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path
) -> None:
    content = bytes(range(256)) * 4000
    fill({f"large{number}": content for number in range(4)})
    fs = make_fs()
    keys = ["large0", "large1", "missing", "large2", "large3"]
    with pytest.raises(FileNotFoundError, match="missing"):
        fs.get([f"{bucket}/{key}" for key in keys], [str(tmp_path / key) for key in keys])
    assert all(path.read_bytes() == content for path in tmp_path.iterdir())
    before = local_tree(tmp_path)
    with FaultServer({"/file": content}) as server:
        server.inject(Fault(FaultKind.STATUS, status=404, path="/file"))  # its HEAD is answered
        with pytest.raises(FileNotFoundError):
            fs.get_file(server.url("/file"), str(tmp_path / "file"))
    assert local_tree(tmp_path) == before


def test_get_of_a_list_may_repeat_itself(make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path) -> None:
    fill({"a/x": b"1", "b/x": b"2"})
    make_fs().get([f"{bucket}/a/x"] * 2, [str(tmp_path / "x")] * 2)
    assert (tmp_path / "x").read_bytes() == b"1"
    with pytest.raises(FileExistsError):
        make_fs().get([f"{bucket}/a/x", f"{bucket}/b/x"], str(tmp_path) + "/")


def test_get_stays_in_its_folder(make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path) -> None:
    fill({"d/../../out": b"x", "d/in": b"y"})
    fs = make_fs()
    with pytest.raises(PlanError, match="is outside of"):
        fs.get(f"{bucket}/d", str(tmp_path / "a" / "b"), recursive=True)
    assert not local_tree(tmp_path)
    fs.get([f"{bucket}/d/../../out"], [str(tmp_path / "named")])
    assert (tmp_path / "named").read_bytes() == b"x"


# -- odd keys

ODD = [
    *("a b", "a+b", "a%20b", "a%b", "a?b", "a#b", "ü/ñ/日本", "a&b=c", "a:b", "a;b,c", "~", "a'b\"c", "a\\b", "$@!()"),
    *("d//x", "/lead", "//two", "d///y", "e//", "f//g//h", "m/", "m/n/", ".", "..", "a/./b", "a/../b", " ", "tab\tb"),
]


@pytest.mark.parametrize("folder", ["", "in/"])
def test_odd_key_is_one_thing_to_every_method(
    make_fs: MakeFileSystem, bucket: str, fill: Fill, folder: str, tmp_path: Path
) -> None:
    objects = {f"{folder}{key}": key.encode() if key[-1] != "/" else b"" for key in ODD}
    fill(objects)
    fs, root = make_fs(), f"{bucket}/{folder}".rstrip("/")
    files = {f"{bucket}/{key}": content for key, content in objects.items() if key[-1] != "/"}
    for path, content in files.items():
        info = fs.info(path)
        assert (info["name"], info["type"], info["size"]) == (path, "file", len(content))
        assert fs.exists(path)
        assert fs.isfile(path)
        assert fs.cat_file(path) == content
        assert "?" in path or fs.cat(path) == content  # to cat() it is a pattern, which may match other names
        with fs.open(f"mpreader://{path}") as file:
            assert file.read() == content
        assert fs.find(path) == [path]
        assert info in fs.ls(path)
        assert info in fs.ls(path.rpartition("/")[0].rstrip("/"))
    for maxdepth in (None, 9):
        assert fs.find(root, maxdepth) == sorted(files)
    assert fs.cat(root, recursive=True) == files
    walked = [(path, name) for path, _, names in fs.walk(root) for name in names]
    assert sorted(f"{path}/{name}" for path, name in walked) == sorted(files)
    assert sorted(fs.glob(f"{root}/**", withdirs=False)) == sorted(files)
    for path in files:
        fs.get_file(path, str(tmp_path / "one"))
        assert (tmp_path / "one").read_bytes() == files[path]


def test_odd_names_are_got_and_globbed(make_fs: MakeFileSystem, bucket: str, fill: Fill, tmp_path: Path) -> None:
    keys = [key for key in ODD if "//" not in key and key[0] != "/" and not {".", ".."} & {*key.split("/")}]
    objects = {f"in/{key}": key.encode() if key[-1] != "/" else b"" for key in keys}
    fill(objects)
    fs = make_fs()
    fs.get(f"{bucket}/in", str(tmp_path / "copy"), recursive=True)
    copied = local_tree(tmp_path / "copy")
    assert {key: copied.get(key.rstrip("/")) for key in keys} == {
        key: objects[f"in/{key}"] if key[-1] != "/" else None for key in keys
    }
    top = {key.partition("/")[0] for key in keys}
    assert {path.rpartition("/")[2] for path in fs.glob(f"{bucket}/in/*")} == top


# -- errors

ASK: dict[str, Callable[[RangeFileSystem, str], Any]] = {
    "exists": lambda fs, path: fs.exists(path),
    "lexists": lambda fs, path: fs.lexists(path),
    "isfile": lambda fs, path: fs.isfile(path),
    "isdir": lambda fs, path: fs.isdir(path),
    "find": lambda fs, path: fs.find(path),
    "find by levels": lambda fs, path: fs.find(path, maxdepth=2),
    "glob": lambda fs, path: fs.glob(path),
    "glob of a pattern": lambda fs, path: fs.glob(f"{path}/*"),
    "walk": lambda fs, path: [*fs.walk(path)],
    "du": lambda fs, path: fs.du(path),
    "mapper": lambda fs, path: "key" in fs.get_mapper(path),
}


@pytest.mark.parametrize("what", ASK)
def test_name_that_is_not_there_is_a_plain_no(make_fs: MakeFileSystem, bucket: str, what: str) -> None:
    assert not ASK[what](make_fs(), f"{bucket}/none")
    assert not ASK[what](make_fs(), "no-such-bucket-at-all/none")


@pytest.mark.parametrize("what", ASK)
def test_refusal_is_no_plain_no(
    make_fs: MakeFileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    nowhere = make_fs(s3client_config=S3ClientConfig(endpoint_url="http://127.0.0.1:1", max_attempts=1))
    with pytest.raises(TransportError, match="Could not connect"):
        ASK[what](nowhere, f"{bucket}/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(AccessDenied):
        ASK[what](make_fs(skip_instance_cache=True), f"{bucket}/none")


@pytest.mark.parametrize("what", ASK)
def test_error_of_a_library_is_no_plain_no(
    make_fs: MakeFileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fs = make_fs()

    def broken(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/nonexistent/token")

    with monkeypatch.context() as patch:
        patch.setattr(type(fs._reader.client()), "_session", property(broken))
        with pytest.raises(FileNotFoundError, match="token"):
            ASK[what](fs, f"{bucket}/none")


def test_walk_tells_of_errors_as_fsspec_says(
    make_fs: MakeFileSystem, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, seen = make_fs(), list[OSError]()
    assert [*fs.walk(f"{bucket}/none", on_error=seen.append)] == []
    assert isinstance(seen[0], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        [*fs.walk(f"{bucket}/none", on_error="raise")]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    denied = make_fs(skip_instance_cache=True)
    assert [*denied.walk(f"{bucket}/d", on_error=seen.append)] == []
    assert isinstance(seen[1], AccessDenied)


def test_walk_goes_only_where_the_caller_lets_it(make_fs: MakeFileSystem, bucket: str, fill: Fill) -> None:
    fill({f"{a}/{b}/file": b"" for a, b in itertools.product("pq", "rs")})
    steps = []
    for path, folders, _ in make_fs().walk(bucket):
        steps.append(path)
        folders[:] = [name for name in folders if name not in ("q", "s")]
    assert steps == [bucket, f"{bucket}/p", f"{bucket}/p/r"]
    upwards = [path for path, _, _ in make_fs().walk(bucket, topdown=False)]
    assert upwards[-1] == bucket
    assert len(upwards) == 7
