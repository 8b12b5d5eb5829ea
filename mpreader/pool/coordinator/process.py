"""The parent's side of one worker process: start it, talk to it, end it, and be sure that it is gone.

Workers are fresh interpreters, never forks: after a fork each write to an existing tensor would copy a page, and
threads of the parent could leave locks held for ever.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
from multiprocessing import spawn
from pathlib import Path
from typing import Final

from mpreader.errors import PoolError
from mpreader.pool.worker.messages import MAX_MESSAGE_BYTES

__all__ = ["WorkerProcess"]

_START: Final = (
    # The package's folder comes last: it may be a site-packages folder, and must not shadow the standard library.
    "import sys; sys.path.pop(0); sys.path.append({root!r}); "
    "from mpreader.pool.worker.main import main; main({arguments})"
)
# No AWS_* and no other secret reaches a worker; these are what an interpreter, DNS and malloc may need.
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "TZ", "RES_OPTIONS", "LOCALDOMAIN", "TMPDIR")
_MAX_STDERR_BYTES: Final = 4096


class WorkerProcess:
    """One worker process. Not thread-safe: owned by the coordinator's thread.

    Attributes:
        number: Its place in the pool; a replacement takes over the number.
        pid: Process id.
        pidfd: Readable once the process has ended.
        sock: Packet socket to it; readable when it has said something, or has closed it.
    """

    def __init__(self, number: int, connections: int, connect_timeout_s: float, stall_timeout_s: float) -> None:
        """Start it; its first message is ``Ready``.

        Raises:
            PoolError: The operating system refused.
        """
        self.number = number
        arguments = (os.getpid(), connections, connect_timeout_s, stall_timeout_s)
        try:
            self._start(arguments)
        except OSError as error:
            raise PoolError(
                f"can't start a worker process: {error}; if it is a limit (ulimit -n, ulimit -u), raise it or "
                "lower PoolConfig.workers"
            ) from error

    def _start(self, arguments: tuple[float, ...]) -> None:
        with contextlib.ExitStack() as undo:
            sock, worker_sock = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(worker_sock.close)
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(sock.close)
            stderr = os.memfd_create("mpreader-worker-stderr")
            on_failure.callback(os.close, stderr)
            code = _START.format(
                root=str(Path(__file__).resolve().parents[3]),
                arguments=", ".join(map(repr, (worker_sock.fileno(), *arguments))),
            )
            self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and code
                [spawn.get_executable(), "-s", "-S", "-c", code],
                pass_fds=(worker_sock.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=_environment(),
                start_new_session=True,  # a Ctrl-C at the terminal goes to the parent alone
            )
            on_failure.callback(self._process.wait)
            on_failure.callback(self._process.kill)
            self.pidfd = os.pidfd_open(self._process.pid)
            on_failure.pop_all()
        sock.setblocking(False)
        self.sock, self._stderr, self.pid = sock, stderr, self._process.pid

    def send(self, message: object, fd: int | None = None) -> bool:
        """Send a message, and a file descriptor with it; False when the worker does not take it."""
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            if fd is None:
                self.sock.send(data)
            else:
                socket.send_fds(self.sock, [data], [fd])
        except OSError:  # gone, or so stuck that hundreds of messages wait: its pidfd or its silence will tell
            return False
        return True

    def try_receive(self) -> object | None:
        """The next message, None if there is none now.

        Raises:
            EOFError: The worker has closed its end.
        """
        try:
            data = self.sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        if not data:
            raise EOFError
        message: object = pickle.loads(data)  # noqa: S301  # from our own worker, over a private socket
        return message

    def kill(self) -> None:
        """Send SIGKILL; it is gone only when ``pidfd`` is readable."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self, timeout_s: float | None = None) -> int:
        """Wait for the end of the process, give back its descriptors, return its exit status.

        Raises:
            subprocess.TimeoutExpired: It did not end in time.
        """
        exitcode = self._process.wait(timeout_s)
        self.close_descriptors()
        return exitcode

    def close_descriptors(self) -> None:
        """Give back descriptors only, as a forked child does: the process is not its own."""
        self._process.poll()  # in a child it finds nothing, and the object can go without a warning
        self.sock.close()
        for fd in (self.pidfd, self._stderr):
            with contextlib.suppress(OSError):
                os.close(fd)

    def stderr(self) -> str:
        """The end of what the worker printed; call it before ``reap``."""
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, _MAX_STDERR_BYTES, max(0, size - _MAX_STDERR_BYTES))
        return tail.decode("utf-8", "replace").strip()


def _environment() -> dict[str, str]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment["MALLOC_ARENA_MAX"] = "2"  # one malloc arena a thread would cost megabytes
    return environment
