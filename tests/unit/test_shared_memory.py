"""Shared memory: without a name and reserved, whatever the kernel makes it of; and one error where there is none."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable, Iterator

import pytest

from mpreader import shared_memory
from mpreader.errors import ArenaError
from mpreader.pool.coordinator import arena
from mpreader.shared_memory import fill, free_shm, has_memfd, open_shared_memory, reserve

SIZE = 3 * mmap.PAGESIZE


def refuse(error: int) -> Callable[..., int]:
    def refused(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    return refused


@pytest.fixture(params=["memfd", "an unnamed file", "a file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernel makes shared memory of."""
    if request.param != "memfd":
        monkeypatch.setattr(os, "memfd_create", refuse(errno.ENOSYS))
    if request.param == "a file":
        monkeypatch.setattr(
            os, "O_TMPFILE", os.O_DIRECTORY
        )  # as an old file system takes it: a folder can't be written
    return str(request.param)


def test_shared_memory_has_no_name_whatever_it_is_made_of(kind: str) -> None:
    before = os.listdir("/dev/shm")
    fd = open_shared_memory(SIZE)
    try:
        assert reserve(fd, 0, SIZE)
        assert os.fstat(fd).st_blocks * 512 >= SIZE, "it is not reserved"
        with mmap.mmap(fd, SIZE) as memory:
            memory[-1] = 7
        assert os.pread(fd, 1, SIZE - 1) == b"\7"
        status = os.fstat(fd)
        assert (status.st_nlink, status.st_mode & 0o777, os.get_inheritable(fd)) == (0, 0o600, False)
        assert os.listdir("/dev/shm") == before
    finally:
        os.close(fd)


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES])
def test_memfd_that_is_refused_is_told(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_memfd()
    monkeypatch.setattr(os, "memfd_create", refuse(error))
    assert not has_memfd()


def test_python_that_knows_no_memfd_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert not has_memfd()
    os.close(open_shared_memory(SIZE))


def test_kernel_that_knows_not_all_flags_makes_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags != os.MFD_CLOEXEC:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    assert has_memfd()
    os.close(open_shared_memory(SIZE))


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.EINVAL])
def test_memory_that_can_not_be_reserved_by_itself_is_reserved_by_writing(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(error))
    fd = open_shared_memory(SIZE)
    try:
        assert not reserve(fd, 0, SIZE)
        fill(fd, SIZE)
        assert os.fstat(fd).st_blocks * 512 >= SIZE
    finally:
        os.close(fd)
    for is_reserved in (True, False):
        segment = arena.Segment(1, SIZE, is_reserved=is_reserved)
        try:
            assert os.fstat(segment.fd).st_blocks * 512 >= SIZE
            segment.map[:] = b"x" * SIZE
            arena.Slot(segment, 0, SIZE, is_alone=True).reserve(0, SIZE)  # again, before each request
            assert segment.map[:] == b"x" * SIZE
        finally:
            segment.close()


@pytest.fixture
def small_files() -> Iterator[int]:
    """A limit of file sizes, as ``ulimit -f`` sets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield 1 << 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_limit_of_file_sizes_is_an_error_that_names_it(kind: str, small_files: int) -> None:
    with pytest.raises(OSError, match="File too large") as caught:
        open_shared_memory(small_files + 1)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(ArenaError, match=r"ulimit -f\) is 1048576 bytes; raise it"):
        arena.Arena(8 << 20, 2 << 20, 4 << 20).allocate(2 << 20)


def test_arena_keeps_its_segments_below_the_limit_of_file_sizes(small_files: int) -> None:
    memory = arena.Arena(8 << 20, 256 << 10, 4 << 20)
    try:
        slots = [memory.allocate(256 << 10) for _ in range(32)]
        assert all(slot is not None and slot.segment.size <= small_files for slot in slots)
        assert memory.allocate(1) is None, "all that it may have"
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.ENOENT, "there is no /dev/shm .*memfd_create is refused.*mount -t tmpfs"),
        (errno.EROFS, "read-only .*remount,rw"),
        (errno.EACCES, "may not be written to .*chmod 1777"),
        (errno.ENOSPC, r"\d+ bytes free .*--shm-size.*MPREADER_MAX_MEMORY"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_shared_memory_that_can_not_be_had_is_one_error_with_its_remedy(
    error: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", refuse(errno.ENOSYS))
    monkeypatch.setattr(shared_memory, "_open_in_shm", refuse(error))
    with pytest.raises(ArenaError, match=advice):
        arena.Arena(8 << 20, 2 << 20, 4 << 20).allocate(1)


def test_memory_that_is_not_free_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "available_memory", lambda: 4 << 20)
    memory = arena.Arena(64 << 20, 1 << 20, 2 << 20)
    try:
        assert memory.allocate(1) is not None
        assert memory.allocate(5 << 20) is None
        monkeypatch.setattr(arena, "available_memory", lambda: 1 << 20)
        assert memory.allocate(1 << 20) is not None
        assert memory.allocate(1 << 20) is None
        assert memory.max_bytes == memory.reserved_bytes == 2 << 20
    finally:
        memory.close()
    with pytest.raises(ArenaError, match=r"\d+ bytes of memory are free.*MPREADER_MAX_MEMORY"):
        arena.Arena(64 << 20, 1 << 20, 2 << 20).allocate(1)


@pytest.mark.parametrize("available", [None, 1 << 40])
def test_host_that_does_not_tell_of_its_memory_gives_what_it_has(
    available: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "available_memory", lambda: available)
    memory = arena.Arena(4 << 20, 1 << 20, 2 << 20)
    try:
        assert memory.allocate(1) is not None
    finally:
        memory.close()


def test_free_bytes_of_dev_shm_are_told_if_the_kernel_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (free_shm() or 0) > 0
    monkeypatch.setattr(os, "statvfs", refuse(errno.ENOENT))
    assert free_shm() == 0
    monkeypatch.setattr(os, "statvfs", refuse(errno.ENOSYS))
    assert free_shm() is None
