"""Blocking primitives of the standard library that fit the kind of threads that this process has.

gevent's monkey patching replaces modules one by one, and programs patch some of them only: ``patch_all(thread=False)``,
or what grequests does. A thread of the operating system that waits in a patched queue or selector is never woken, and
a greenlet that waits in an unpatched one stops all others, the one that would wake it included. So what the pool waits
in is chosen by whether threads are greenlets: gevent's own if they are, the standard library's original otherwise.

Looked up at each use, since a program may patch after it has imported mpreader. Without gevent this costs one look-up.

Descriptors are closed by ``posix.close``, in the whole pool: gevent's ``os.close``, and the ``close`` of its sockets,
leave that to an event loop, which a thread of the pool does not have.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import queue
import selectors
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

from mpreader.errors import PoolError
from mpreader.shared_memory import REFUSED, naming

__all__ = ["make_queue", "make_selector", "popen_class", "sockets_are_patched"]


def make_queue() -> queue.SimpleQueue[Any]:
    """Make a ``queue.SimpleQueue`` between threads."""
    made: queue.SimpleQueue[Any] = _fitting(queue, "SimpleQueue", "gevent.queue", "SimpleQueue")()
    return made


def make_selector(fd: int) -> selectors.BaseSelector:
    """Make the best selector; that is ``poll`` where the kernel refuses one of the system calls of ``epoll``.

    Args:
        fd: Descriptor that it is to wait for, until that is readable.

    Raises:
        OSError: There is no descriptor left, or neither is allowed.
    """
    try:
        return _try_selector("DefaultSelector", fd)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    with naming("poll, and epoll_create1, epoll_ctl or epoll_wait"):
        return _try_selector("PollSelector", fd)


def _try_selector(name: str, fd: int) -> selectors.BaseSelector:
    made: selectors.BaseSelector = _fitting(selectors, name, "gevent.selectors", "GeventSelector")()
    try:
        made.register(fd, selectors.EVENT_READ)
        if not _are_greenlets():  # which wait in gevent's own loop, and are not to be switched here
            made.select(0)
    except BaseException:
        made.close()
        raise
    return made


def popen_class() -> type[subprocess.Popen[bytes]]:
    """Return ``subprocess.Popen``."""
    found: type[subprocess.Popen[bytes]] = _fitting(subprocess, "Popen", "gevent.subprocess", "Popen")
    # gevent also takes the function away that the original starts processes by.
    return found if getattr(subprocess, "_fork_exec", True) is not None or _are_greenlets() else _popen_of_a_copy()


def sockets_are_patched() -> bool:
    """Return True if gevent has patched sockets: then one made here must not be used in a thread of the system."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("socket")


def _are_greenlets() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_object_patched("_thread", "start_new_thread")


def _fitting(module: Any, name: str, gevent_module: str, gevent_name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(module, name)
    if _are_greenlets():
        return getattr(importlib.import_module(gevent_module), gevent_name)
    return monkey.get_original(module.__name__, name)


@functools.cache
def _popen_of_a_copy() -> type[subprocess.Popen[bytes]]:
    """Return ``Popen`` of a copy of the module that nobody has patched; its errors are the module's."""
    spec = importlib.util.find_spec("subprocess")
    if spec is None or spec.loader is None:
        raise PoolError("gevent has patched subprocess, and the original can't be loaded; patch threads, too")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.os, module.time = _unpatched_copy(os), _unpatched_copy(time)
    module.TimeoutExpired = subprocess.TimeoutExpired
    found: type[subprocess.Popen[bytes]] = module.Popen
    return found


def _unpatched_copy(module: ModuleType) -> ModuleType:
    copied = ModuleType(module.__name__)
    vars(copied).update(vars(module), **sys.modules["gevent.monkey"].saved.get(module.__name__, {}))
    return copied
