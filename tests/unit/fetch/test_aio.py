"""Tests of the take that a task waits for, without a pool."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from mpreader.errors import PoolTimeout
from mpreader.fetch.aio import _take_first
from mpreader.pool.transfer import Transfer
from mpreader.telemetry.progress import Progress


class Take:
    is_done = False


class OneTake:
    """A transfer, as far as one take needs it; the test finishes it."""

    received_bytes = 0

    def __init__(self) -> None:
        self.take = Take()
        self.on_done: Callable[[], object] = lambda: None
        self.was_cancelled = False

    def begin_take(self, wanted: object, on_done: Callable[[], object]) -> Take:
        self.on_done = on_done
        return self.take

    def result(self, take: Take) -> tuple[int, memoryview]:
        return 0, memoryview(b"bytes")

    def cancel(self, take: Take) -> None:
        self.was_cancelled = True

    def timeout_error(self, wanted: object) -> PoolTimeout:
        return PoolTimeout("too late")

    def finish(self) -> None:
        self.take.is_done = True
        self.on_done()


class NoProgress:
    is_shown = False

    def advance_to(self, received: int) -> None:
        pass


def take_first(transfer: OneTake, deadline: float) -> asyncio.Task[tuple[int, memoryview]]:
    untyped: Any = transfer
    return asyncio.ensure_future(_take_first(cast(Transfer, untyped), (0,), deadline, cast(Progress, NoProgress())))


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("timeout_s", [60.0, math.inf])
def test_cancellation_that_comes_together_with_the_bytes_is_not_lost(timeout_s: float, steps: int) -> None:
    async def main() -> None:
        transfer = OneTake()
        task = take_first(transfer, time.monotonic() + timeout_s)
        await asyncio.sleep(0)
        transfer.finish()
        for _ in range(steps):  # of the loop, from the bytes to the cancellation
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task
            assert transfer.was_cancelled, "its slot would stay occupied"
        else:
            assert task.result()[0] == 0

    asyncio.run(main())


def test_bytes_that_do_not_come_in_time_are_not_waited_for() -> None:
    async def main() -> None:
        transfer = OneTake()
        with pytest.raises(PoolTimeout):
            await take_first(transfer, time.monotonic() + 0.01)
        assert transfer.was_cancelled

    asyncio.run(main())
