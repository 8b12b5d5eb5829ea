"""Loading ahead: a thread loads the next batch of a conversion while the converter writes the one before it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["loaded_ahead"]

Request = TypeVar("Request")
Loaded = TypeVar("Loaded")


def loaded_ahead(load: Callable[[Request], Loaded], requests: Iterable[Request]) -> Generator[Loaded, None, None]:
    """Yield what ``load`` returns for each request, in order; a thread loads the next one meanwhile.

    Closing the generator waits for the load that is under way.
    """
    with ThreadPoolExecutor(1, "mpreader-convert") as thread:
        pending: Future[Loaded] | None = None
        for request in requests:
            before, pending = pending, thread.submit(load, request)
            if before is not None:
                yield before.result()
        if pending is not None:
            yield pending.result()
