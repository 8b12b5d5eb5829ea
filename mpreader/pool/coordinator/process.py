"""The parent's side of one worker process: start it, talk to it, end it, and be sure that it is gone.

Workers are fresh interpreters, never forks: after a fork each write to an existing tensor would copy a page, and
threads of the parent could leave locks held for ever.
"""

from __future__ import annotations

import _socket
import contextlib
import os
import pickle
import posix
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Final, cast

from mpreader.errors import PoolError
from mpreader.pool.blocking import popen_class
from mpreader.pool.coordinator.interpreter import MARK, ROOT, Interpreter, InterpreterChoice, require_no_worker
from mpreader.pool.worker.messages import MAX_MESSAGE_BYTES
from mpreader.shared_memory import REFUSED, naming

__all__ = ["WorkerProcess"]

_START: Final = (
    # The package's folder comes last: it may be a site-packages folder, and must not shadow the standard library.
    "import sys; sys.path.pop(0); sys.path.append({root!r}); "
    "from mpreader.pool.worker.main import main; main({arguments})"
)
# No AWS_* and no other secret reaches a worker; these are what an interpreter, DNS and malloc may need.
_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "LANG", "TZ", "RES_OPTIONS", "LOCALDOMAIN", "TMPDIR")
# What a program frozen by PyInstaller tells itself: where it was unpacked, which is not to be done once more.
_ENVIRONMENT_OF_FROZEN: Final = ("_PYI_", "_MEIPASS2")
_MAX_STDERR_BYTES: Final = 4096
_PIPE_BYTES: Final = 65536


class WorkerProcess:
    """One worker process. Not thread-safe: owned by the coordinator's thread.

    Attributes:
        number: Its place in the pool; a replacement takes over the number.
        pid: Process id.
        pidfd: Readable once the process has ended; -1 if the kernel refuses such a descriptor: then its end is seen by
            the end of the socket, and by :meth:`has_ended`.
        sock: Packet socket to it; readable when it has said something, or has closed it.
    """

    def __init__(
        self,
        number: int,
        connections: int,
        connect_timeout_s: float,
        stall_timeout_s: float,
        interpreter: Interpreter | None = None,
    ) -> None:
        """Start it; its first message is ``Ready``.

        Raises:
            PoolError: The operating system refused, or this process is itself to be a worker.
        """
        require_no_worker()
        self.number = number
        self._interpreter = interpreter or InterpreterChoice().current
        self._has_session = True
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
            with naming("socketpair"):
                sock, worker_sock = _socketpair()
            undo.callback(worker_sock.close)
            on_failure = undo.enter_context(contextlib.ExitStack())
            on_failure.callback(sock.close)
            # The writing end never blocks: a worker that prints more than fits goes on.
            with naming("pipe2"):
                stderr, worker_stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(posix.close, worker_stderr)
            on_failure.callback(posix.close, stderr)
            with naming("ioctl or fcntl"):
                sock.setblocking(False)
            with naming("one of those that start a process: clone, vfork, sigprocmask, fcntl, dup2, close_range, …"):
                self._process = self._spawn((worker_sock.fileno(), *arguments), worker_stderr)
            on_failure.callback(self._process.wait)
            on_failure.callback(self._process.kill)
            self.pidfd = _try_pidfd_open(self._process.pid)
            on_failure.pop_all()
        self.sock, self._stderr, self.pid = sock, stderr, self._process.pid

    def _spawn(self, arguments: tuple[float, ...], stderr: int) -> subprocess.Popen[bytes]:
        """Start the interpreter with a worker's arguments, of which the first is the descriptor of its socket."""
        with contextlib.ExitStack() as undo:
            fds = [int(arguments[0])]
            if self._interpreter.is_program:
                fds.append(_pipe_with_start(undo, arguments))
                command = [self._interpreter.path, *_frozen_arguments(fds[1])]
            else:
                code = _START.format(root=ROOT, arguments=", ".join(map(repr, arguments)))
                command = [self._interpreter.path, "-s", "-S", "-c", code]
            try:
                return _popen(command, fds, stderr, start_new_session=True)
            except OSError as error:
                # An error that names a file is the executable's. Otherwise it is the child's, before it had become
                # that: of setsid, if it is one of these.
                if error.errno not in REFUSED or error.filename is not None:
                    raise
            # In the terminal's foreground group a Ctrl-C reaches the worker, too. It ignores that later, but must not
            # be interrupted while it starts: the signal is blocked here, and a process inherits what is blocked.
            self._has_session = False
            with _sigint_blocked():
                return _popen(command, fds, stderr, start_new_session=False)

    def send(self, message: object, fd: int | None = None) -> bool:
        """Send a message, and a file descriptor with it; False when the worker does not take it.

        Raises:
            PoolError: The operating system refuses that.
        """
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        try:
            if fd is None:
                self.sock.send(data)
            else:
                socket.send_fds(self.sock, [data], [fd])
        except OSError as error:
            if error.errno in REFUSED:
                call = "sendto" if fd is None else "sendmsg, with a descriptor"
                raise PoolError(f"can't send to a worker process: {error.strerror} ({call})") from error
            # Gone, or so stuck that hundreds of messages wait: its pidfd or its silence will tell.
            return False
        return True

    def try_receive(self) -> object | None:
        """The next message, None if there is none now.

        Raises:
            EOFError: The worker has closed its end.
            PoolError: The operating system refuses to receive.
        """
        try:
            data = self.sock.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in REFUSED:
                raise PoolError(f"can't receive from a worker process: {error.strerror} (recvfrom)") from error
            data = b""
        if not data:
            raise EOFError
        message: object = pickle.loads(data)  # noqa: S301  # from our own worker, over a private socket
        return message

    def kill(self) -> None:
        """Send SIGKILL; it is gone only when ``pidfd`` is readable, or ``has_ended`` says so."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return
            except (OSError, AttributeError):  # refused, or not known to this interpreter: below
                pass
            else:
                return
        with contextlib.suppress(OSError):
            self._process.kill()  # does nothing once it was reaped; until then its number is no other process's

    def kill_group(self) -> None:
        """Send SIGKILL to it and to all that it has started: what it is, is not known."""
        if self._has_session and self._process.returncode is None:
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        self.kill()

    def has_ended(self) -> bool:
        """True if the process has ended; for a process without ``pidfd``."""
        return self._process.poll() is not None

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
                posix.close(fd)

    def stderr(self) -> str:
        """The end of what the worker printed (of its first 64 KiB); call it once, before ``reap``."""
        try:
            printed = os.read(self._stderr, _PIPE_BYTES)
        except BlockingIOError:  # nothing, and a process that it has started still has the other end
            return ""
        return printed[-_MAX_STDERR_BYTES:].decode("utf-8", "replace").strip()


def _socketpair() -> tuple[socket.socket, socket.socket]:
    # Not socket.socketpair(): see mpreader.pool.blocking. The objects lack the parts of socket.socket in Python only.
    return cast("tuple[socket.socket, socket.socket]", _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))


def _popen(command: list[str], fds: list[int], stderr: int, *, start_new_session: bool) -> subprocess.Popen[bytes]:
    return popen_class()(
        command,
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=stderr,
        stderr=stderr,
        env=_environment(),
        start_new_session=start_new_session,  # a Ctrl-C at the terminal goes to the parent alone
    )


def _frozen_arguments(pipe: int) -> list[str]:
    from mpreader.pool.worker.frozen import arguments_for  # with it comes the worker's code, which is not needed here

    return arguments_for(pipe)


def _pipe_with_start(undo: contextlib.ExitStack, arguments: tuple[float, ...]) -> int:
    """Return the reading end of a pipe that has in it what a frozen program is to run."""
    from mpreader.pool.worker.frozen import pickled_start

    pipe, writable = os.pipe2(os.O_CLOEXEC)
    undo.callback(posix.close, pipe)
    with open(writable, "wb") as file:
        file.write(pickled_start(arguments))  # far less than fits into a pipe
    return pipe


def _try_pidfd_open(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except AttributeError:  # an interpreter that was built for old kernels
        return -1
    except OSError as error:
        if error.errno in REFUSED:
            return -1
        raise


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    if getattr(sys, "frozen", False):
        environment.update((name, os.environ[name]) for name in os.environ if name.startswith(_ENVIRONMENT_OF_FROZEN))
    environment[MARK] = str(os.getpid())
    environment["MALLOC_ARENA_MAX"] = "2"  # one malloc arena a thread would cost megabytes
    return environment
