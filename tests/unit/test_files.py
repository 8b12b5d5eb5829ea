"""Files that appear whole: until they are, what was there stays, and nothing temporary outlives an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mpreader.files import errors_naming, whole_file


@pytest.mark.parametrize("before", [None, b"before"])
def test_whole_file_takes_its_place_when_the_block_ends(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with whole_file(path) as file:
        file.write(b"after")
        file.flush()
        assert (path.read_bytes() if path.exists() else None) == before
    assert path.read_bytes() == b"after"
    assert file.closed
    assert os.listdir(tmp_path) == ["file"]


def _write_half(path: Path, error: type[BaseException]) -> None:
    with whole_file(path) as file:
        file.write(b"half of it")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whole_file_of_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(error):
        _write_half(tmp_path / "file", error)
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_whole_file_that_does_not_get_to_the_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught, whole_file(path) as file:
        file.write(b"after")
    assert caught.value.filename == str(path), "not a name that the user has never heard of"
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_whole_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    with whole_file(tmp_path / "file"):
        pass
    (tmp_path / "usual").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_whole_file_takes_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_file("file") as file:
        file.write(b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_error_of_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, whole_file(tmp_path / "none" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "file")


def test_errors_naming_keeps_the_kind_of_error(tmp_path: Path) -> None:
    with pytest.raises(PermissionError) as caught, errors_naming(tmp_path / "file"):
        raise OSError(errno.EACCES, "denied", "another name")
    assert (caught.value.strerror, caught.value.filename) == ("denied", str(tmp_path / "file"))
