"""Progress bar of long work: bytes done, rate and time left, on stderr.

Readers, fetchers and the commands count bytes with it. A bar must not fail the work that it shows: if it can't be
drawn, it is given up, and the work goes on without it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, Final

from mpreader.ranks import global_rank

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Progress", "progress_bar"]

_DELAY_S: Final = 0.5  # work that is done sooner shows no bar
# Values of MPREADER_PROGRESS that turn all bars off.
_OFF: Final = ("0", "false", "no", "off")

_log = logging.getLogger(__name__)


class Progress:
    """Progress of one job, with a bar or without; made by :func:`progress_bar`. A context manager.

    Several threads may call it. It has no lock, so bytes that two of them add at the same moment may be counted once.
    """

    def __init__(self, bar: Any = None, total_bytes: int = 0) -> None:
        self._bar = bar
        self._total = total_bytes
        self._done = 0

    @property
    def is_shown(self) -> bool:
        """True if there is a bar that can be drawn."""
        return self._bar is not None

    def advance(self, nbytes: int) -> None:
        """Count ``nbytes`` more as done."""
        self.advance_to(self._done + nbytes)

    def advance_to(self, done_bytes: int) -> None:
        """Count ``done_bytes`` of the whole work as done.

        The bar never moves back, nor beyond its end: a smaller number than before is ignored, a number larger than the
        whole work counts as all of it. Callers may therefore count bytes that will perhaps be received again.
        """
        if self._bar is not None:
            added = min(done_bytes, self._total) - self._done
            if added <= 0:
                return
            self._done += added
            try:
                self._bar.update(added)
            except Exception:  # noqa: BLE001  # such as a terminal that was closed: the work must go on
                self._give_up()

    def close(self) -> None:
        """End the bar. Idempotent."""
        # Forgotten first, so that a second call, or a thread that still counts, finds no bar.
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.close()
            except Exception:  # noqa: BLE001  # as in advance_to
                self._give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_up(self) -> None:
        self._bar = None
        _log.debug("the progress bar can't be drawn", exc_info=True)


def progress_bar(total_bytes: int, description: str, *, show: bool | None = None, leave: bool = True) -> Progress:
    """Begin a bar on stderr; it appears when the work takes longer than half a second.

    Args:
        total_bytes: Bytes of the whole work.
        description: Name of the work, in a word or two.
        show: None: on a terminal or in a notebook, and in the first of several ranks only. True: always. False: never.
            ``MPREADER_PROGRESS=0`` in the environment turns all of them off.
        leave: True: the bar stays on the screen when the work is over.
    """
    if not _is_shown(show):
        return Progress()
    try:
        bar = _bar_class()(
            total=total_bytes,
            desc=description,
            leave=leave,
            delay=_DELAY_S,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
        )
    except Exception:  # noqa: BLE001  # a missing widget, a closed stderr: the work is done without a bar
        _log.debug("the progress bar can't be drawn", exc_info=True)
        return Progress()
    return Progress(bar, total_bytes)


def _is_shown(show: bool | None) -> bool:
    if show is False or os.environ.get("MPREADER_PROGRESS", "").strip().lower() in _OFF:
        return False
    if show:
        return True
    # One bar for a job, not one for each of its ranks, whose lines would overwrite each other.
    return global_rank() == 0 and (_is_notebook() or _is_terminal())


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # sys.stderr is None, or was closed
        return False


def _is_notebook() -> bool:
    # Not imported: in a notebook it is imported already, elsewhere importing it would only cost time.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")  # IPython on a terminal has a shell, but no kernel


@functools.cache
def _bar_class() -> Any:
    # Imported when the first bar is drawn, since most programs show none. Cached, so that there is one class.
    if _is_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns of missing widgets, and then draws the bar as text
            from tqdm.autonotebook import tqdm as base
    else:
        from tqdm import tqdm as base

    class Bar(base):  # type: ignore[type-arg]  # chosen at run time
        """tqdm's bar without its thread and its lock between processes: neither may outlive a load."""

        monitor_interval = 0
        _lock = threading.RLock()

    return Bar
