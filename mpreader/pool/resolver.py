"""Source resolver: finds out versions and routes of sources in background threads, on the caller's side.

HEAD requests and the renewal of credentials block on the network, and the coordinator's thread must not. Sources stay
with the caller: they hold clients and credentials, which can't cross a process border; only versions and routes do.
"""

from __future__ import annotations

from collections.abc import Callable

from mpreader.errors import MpreaderError, TransportError
from mpreader.pool.background import BackgroundThreads
from mpreader.pool.requests import ResolveSource, SourceResolved
from mpreader.pool.source import ObjectVersion, Reroutable, Source
from mpreader.pool.worker.route import Route

__all__ = ["SourceResolver"]

_Outcome = tuple[ObjectVersion | None, Route | None]


class SourceResolver:
    """Answers ResolveSource by SourceResolved. Its methods are called by the coordinator's thread only.

    Args:
        tell: Sends an answer to the coordinator; called from the background threads.
    """

    def __init__(self, tell: Callable[[object], None]) -> None:
        self._tell = tell
        self._threads = BackgroundThreads("mpreader-sources")

    def resolve(self, question: ResolveSource, source: Source) -> None:
        """Begin to find out the route of a source, and its version if that is needed."""

        def ask() -> _Outcome:
            if question.refusal is not None:
                return None, source.other_route(question.refusal) if isinstance(source, Reroutable) else None
            return source.open() if question.needs_version else None, source.route()

        self._threads.submit(ask, lambda outcome: self._tell(_answer(question, source, outcome)))

    def close(self) -> None:
        """Let the threads end; one that is blocked on the network ends after it."""
        self._threads.close()


def _answer(question: ResolveSource, source: Source, outcome: _Outcome | Exception) -> SourceResolved:
    read, number = question.read, question.source
    if isinstance(outcome, MpreaderError):
        return SourceResolved(read, number, None, None, outcome)
    if isinstance(outcome, Exception):  # whatever a library raises must reach the consumer
        error = TransportError(f"can't open {source.uri}: {outcome!r}", bucket=source.bucket, key=source.key)
        error.__cause__ = outcome
        return SourceResolved(read, number, None, None, error)
    return SourceResolved(read, number, *outcome, None)
