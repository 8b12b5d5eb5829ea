"""Warm interpreter: runs Python programs without the seconds that an import of torch takes each of them.

A process imports what takes long and then forks for each program. The fork runs it as ``python FILE`` or ``python -m
MODULE`` do: as ``__main__``, with arguments, environment, working folder and standard streams of its own, up to the end
of the interpreter. What a test proves of the imports themselves, or of a start from ``stdin`` or by ``spawn``, needs an
interpreter of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["WarmInterpreter"]

_TIMEOUT_S = 150
_PROGRAM = """
import atexit, gc, importlib, json, os, runpy, socket, sys, warnings
import boto3, matplotlib.pyplot, torch.distributed.checkpoint, mpreader.cli.main, mpreader.dcp

channel = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, streams, _, _ = socket.recv_fds(channel, 1 << 20, 2)
    if not message:
        sys.exit()
    request = json.loads(message)
    for name in request["preload"]:
        importlib.import_module(name)
    pid = os.fork()
    if not pid:
        break
    for stream in streams:
        os.close(stream)
    channel.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

channel.close()
atexit.register(gc.freeze)  # at the very end, where the last collection would copy, page by page, all that was imported
for number, stream in enumerate(streams, 1):
    os.dup2(stream, number)
    os.close(stream)
os.chdir(request["folder"])
os.environ.clear()
os.environ.update(request["environment"])
sys.argv = request["argv"]
if request["is_strict"]:
    warnings.simplefilter("error")
if request["module"]:
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
else:
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


class WarmInterpreter:
    """Runs programs one after the other, each in a fork of a process that has imported torch.

    Use it as a context manager.
    """

    def __enter__(self) -> Self:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )
        self._channel.settimeout(_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self._process.wait()

    @property
    def pid(self) -> int:
        """Process id of the interpreter; a program that runs is its only child."""
        return self._process.pid

    def run(
        self, *argv: str | Path, module: str = "", is_strict: bool = False, preload: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in this process's environment and working folder, and wait for its end.

        Args:
            argv: The program's ``sys.argv``; its first element is the file, or any name of the module.
            module: Module to run in place of a file.
            is_strict: True makes warnings errors, as ``python -W error`` does.
            preload: Modules to import before the program, for it and for all later ones.
        """
        request: dict[str, Any] = {
            "argv": [*map(str, argv)],
            "module": module,
            "is_strict": is_strict,
            "preload": preload,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            socket.send_fds(self._channel, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
            exit_code = int(self._channel.recv(100))
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read())
        return subprocess.CompletedProcess(request["argv"], exit_code, *texts)
