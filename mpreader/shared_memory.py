"""Shared memory of the operating system: made without a name, and reserved before it is used.

It comes from ``memfd_create`` where the kernel has that, else from an unnamed file in ``/dev/shm``. Neither has a name
that a crash could leave behind, and neither needs Python's resource tracker, which starts a process of its own (in a
frozen program: the program once more). ``memfd_create`` comes first because it works without ``/dev/shm``, and is not
bounded by its size, which is 64 MB in a default Docker container: it is the same memory, counted by the same control
group, and as fast. The free memory of the host bounds it instead (:mod:`mpreader.host`).

The arena makes its segments here, and the host's facts are asked for here. This module must not import any of mpreader.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posix
import resource
import secrets
from collections.abc import Iterator
from typing import Final

__all__ = [
    "REFUSED",
    "fill",
    "free_shm",
    "has_memfd",
    "largest_file_bytes",
    "naming",
    "open_shared_memory",
    "reserve",
]

# Of a system call that this kernel does not have, or that a filter (seccomp, gVisor) or a security module refuses.
REFUSED: Final = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES})

_SHM: Final = "/dev/shm"  # noqa: S108  # made there are only files without a name
# A host may demand this flag (sysctl vm.memfd_noexec=2); kernels before 6.3 do not know it.
_MFD_NOEXEC_SEAL: Final = 8
_NO_FALLOCATE: Final = REFUSED | {errno.EOPNOTSUPP, errno.EINVAL}
_FILL_BYTES: Final = 1024 * 1024


@contextlib.contextmanager
def naming(call: str) -> Iterator[None]:
    """Name the system call in an error of it: otherwise nobody could tell which one a sandbox has refused.

    An error that names a file is left as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror} ({call})") from None


def open_shared_memory(size: int) -> int:
    """Make shared memory of ``size`` bytes that has no name; nothing of it is reserved yet.

    Returns:
        Its descriptor, which other processes may be given.

    Raises:
        OSError: There is none to be had; ``errno`` says why. EFBIG: the limit of file sizes (``ulimit -f``).
    """
    # Beyond that limit the kernel sends SIGXFSZ, too, which ends a program whose interpreter does not ignore it.
    limit = largest_file_bytes()
    if limit is not None and size > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    try:
        fd = _open_memfd()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # /dev/shm would not be better off
            raise
        fd = _open_in_shm()
    try:
        with naming("fchmod"):
            os.fchmod(fd, 0o600)  # for its owner alone, who could open it by /proc
        with naming("ftruncate"):
            os.ftruncate(fd, size)
    except BaseException:
        posix.close(fd)
        raise
    return fd


def reserve(fd: int, start: int, end: int) -> bool:
    """Reserve bytes [start, end) of shared memory, so that writing to them can't fail, or end the process by SIGBUS.

    Returns:
        False if the kernel refuses to reserve without writing (``fallocate``): see :func:`fill`.

    Raises:
        OSError: There is no room (ENOSPC, ENOMEM).
    """
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        if error.errno in _NO_FALLOCATE:
            return False
        raise
    return True


def fill(fd: int, size: int) -> None:
    """Reserve new shared memory by writing zeros to all of it.

    Raises:
        OSError: There is no room (ENOSPC, ENOMEM).
    """
    zeros = memoryview(bytes(min(size, _FILL_BYTES)))
    done = 0
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], done)  # on a full file system an error, never a SIGBUS


def largest_file_bytes() -> int | None:
    """Return the limit of file sizes (``ulimit -f``), which shared memory obeys, too; None if there is none."""
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    except (OSError, ValueError):  # a filter refuses the call
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def has_memfd() -> bool:
    """True if shared memory is made by ``memfd_create``: then ``/dev/shm`` is not needed, and does not bound it."""
    try:
        posix.close(_open_memfd())
    except OSError as error:
        return error.errno not in REFUSED
    return True


def free_shm() -> int | None:
    """Return the bytes that are free in ``/dev/shm``: 0 if there is none, None if the kernel does not tell."""
    try:
        status = os.statvfs(_SHM)
    except OSError as error:
        return None if error.errno in REFUSED else 0
    return status.f_bavail * status.f_frsize


def _open_memfd() -> int:
    if not hasattr(os, "memfd_create"):  # a C library before glibc 2.27
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        return os.memfd_create("mpreader", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("mpreader", os.MFD_CLOEXEC)


def _open_in_shm() -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    with contextlib.suppress(OSError):  # a file system that can't; any other reason comes again below
        return os.open(_SHM, flags | os.O_TMPFILE, 0o600)
    path = f"{_SHM}/mpreader-{secrets.token_hex(8)}"
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    os.unlink(path)
    return fd
