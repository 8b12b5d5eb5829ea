"""Guard of the unit tests: none starts a process or a server, so that they take seconds and run anywhere.

What needs a process or a server is in ``tests/integration/``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

_REFUSED = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "socket.bind"})
_is_unit_test = False


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if _is_unit_test and event in _REFUSED:
        raise RuntimeError(f"{event} in a unit test: it belongs in tests/integration")


sys.addaudithook(_refuse)  # for ever, therefore the flag


@pytest.fixture(autouse=True)
def _no_process_and_no_server() -> Iterator[None]:
    global _is_unit_test
    _is_unit_test = True
    yield
    _is_unit_test = False
