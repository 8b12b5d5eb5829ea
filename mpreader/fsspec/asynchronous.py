"""Asynchronous half of the file system: fsspec's methods with an underscore, which an event loop awaits.

zarr and other asynchronous programs call ``await fs._cat_file(…)`` where synchronous ones call ``fs.cat_file(…)``. Each
such method runs its synchronous counterpart on a thread, so that there is one implementation of each. A thread costs
little here: it waits for the worker processes, which receive the bytes.

The synchronous methods are added by the parts above this one, which :mod:`mpreader.fsspec.filesystem` draws.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from fsspec.asyn import AsyncFileSystem, get_loop
from fsspec.spec import AbstractFileSystem

from mpreader.config import check_type
from mpreader.errors import ConfigError

__all__ = ["ThreadedFileSystem"]

Result = TypeVar("Result")

_THREADS: Final = 32  # calls that run at one time, where batch_size does not say otherwise


def _on_thread(name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Make the asynchronous counterpart of a method."""

    async def method(self: ThreadedFileSystem, *args: Any, **options: Any) -> Any:
        return await self._run(getattr(self, name), *args, **options)

    method.__name__ = f"_{name}"
    method.__doc__ = f"Do what :meth:`{name}` does, on a thread."
    return method


class ThreadedFileSystem(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only file system whose asynchronous methods run the synchronous ones on threads.

    Args:
        asynchronous: True: the caller awaits the methods with an underscore, in an event loop of its own. The others
            work all the same; they block.
        loop: Event loop on which fsspec's own synchronous functions run asynchronous methods. None: fsspec's.
        batch_size: Most files that one call reads or copies at the same time, and most asynchronous calls that run at
            the same time. None, or fsspec's -1: no bound of the caller's.
        listing_options: Options of fsspec's ``DirCache``.
    """

    async_impl = True
    # fsspec would otherwise replace inherited synchronous methods by ones that run the asynchronous ones on its loop.
    mirror_sync_methods = False

    def __init__(self, *, asynchronous: bool, loop: Any, batch_size: int | None, **listing_options: Any) -> None:
        check_type("asynchronous", asynchronous, bool)
        check_type("loop", loop, asyncio.AbstractEventLoop)
        if batch_size is not None and (type(batch_size) is not int or batch_size < -1 or batch_size == 0):
            raise ConfigError(
                f"batch_size must be a whole number of at least 1, or -1 for no bound, got {batch_size!r}"
            )
        # Not the __init__ of AsyncFileSystem: it starts the thread of fsspec's loop, which no method here needs.
        AbstractFileSystem.__init__(self, **listing_options)
        self.asynchronous = asynchronous
        self.batch_size = batch_size
        self._loop = loop
        self._executor: tuple[int, ThreadPoolExecutor] | None = None  # with the process that has its threads

    @property
    def loop(self) -> Any:
        """Event loop for fsspec's own functions; None if the file system is asynchronous, as fsspec has it."""
        return self._loop if self._loop is not None or self.asynchronous else get_loop()

    _info = _on_thread("info")
    _exists = _on_thread("exists")
    _isfile = _on_thread("isfile")
    _isdir = _on_thread("isdir")
    _ls = _on_thread("ls")
    _find = _on_thread("find")
    _glob = _on_thread("glob")
    _du = _on_thread("du")
    _size = _on_thread("size")
    _sizes = _on_thread("sizes")
    _expand_path = _on_thread("expand_path")
    _cat = _on_thread("cat")
    _cat_file = _on_thread("cat_file")
    _cat_ranges = _on_thread("cat_ranges")
    _get = _on_thread("get")
    _get_file = _on_thread("get_file")

    async def _walk(self, *args: Any, **options: Any) -> AsyncIterator[tuple[str, Any, Any]]:
        """Do what :meth:`walk` does; each folder is listed on a thread."""
        steps = self.walk(*args, **options)
        while (step := await self._run(next, steps, None)) is not None:
            yield step

    async def _run(self, function: Callable[..., Result], *args: Any, **options: Any) -> Result:
        """Call a function on a thread, with the context variables of the task."""
        call = partial(contextvars.copy_context().run, function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads(), call)

    def _threads(self) -> ThreadPoolExecutor:
        """Return the threads of this process; they are started one by one, as calls need them."""
        executor = self._executor
        if executor is None or executor[0] != os.getpid():  # a forked child has none of its parent's threads
            count = self.batch_size if self.batch_size is not None and self.batch_size > 0 else _THREADS
            executor = self._executor = os.getpid(), ThreadPoolExecutor(count, "mpreader-fsspec")
        return executor[1]

    def close(self) -> None:
        """End the threads that have nothing to do; the others end when they are done. Idempotent."""
        executor, self._executor = self._executor, None
        if executor is not None and executor[0] == os.getpid():
            executor[1].shutdown(wait=False)

    # -- methods that write, all of which are refused

    def _refuse(self, path: Any = None, *_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "mpreader's file system only reads", str(path))

    async def _refuse_async(self, path: Any = None, *_: object, **__: object) -> NoReturn:
        self._refuse(path)

    mkdir = makedirs = rmdir = rm = rm_file = touch = _refuse
    copy = cp_file = mv = put = put_file = pipe = pipe_file = _refuse
    _mkdir = _makedirs = _rm = _rm_file = _copy = _cp_file = _mv_file = _refuse_async
    _put = _put_file = _pipe = _pipe_file = _refuse_async
