"""Progress bar of long work: bytes done, rate and time left, on stderr.

Loads, fetches and the commands count bytes with it. A bar is never worth an error: one that can't be drawn is given up,
and the work goes on.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Progress", "progress_bar"]

_DELAY_S: Final = 0.5  # work that is done sooner shows no bar
_OFF: Final = ("0", "false", "no", "off")

_log = logging.getLogger(__name__)


class Progress:
    """Progress of one job, with a bar or without; made by :func:`progress_bar`. A context manager.

    Several threads may call it. What two of them add at the very same time may be counted once.
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
        """Count ``done_bytes`` of the whole work as done; less than before, or more than all, is not counted.

        So it may be told of bytes that are on their way and may have to be received again.
        """
        if self._bar is not None:
            added = min(done_bytes, self._total) - self._done
            if added <= 0:
                return
            self._done += added
            try:
                self._bar.update(added)
            except Exception:  # noqa: BLE001  # a terminal that was closed, say
                self._give_up()

    def close(self) -> None:
        """End the bar. Idempotent."""
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
    except Exception:  # noqa: BLE001  # a missing widget, a closed stderr: no reason not to do the work
        _log.debug("the progress bar can't be drawn", exc_info=True)
        return Progress()
    return Progress(bar, total_bytes)


def _is_shown(show: bool | None) -> bool:
    if show is False or os.environ.get("MPREADER_PROGRESS", "").strip().lower() in _OFF:
        return False
    if show:
        return True
    # One bar for a job, not one for each of its ranks.
    return os.environ.get("RANK", "0") == "0" and (_is_notebook() or _is_terminal())


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it was closed
        return False


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")  # never imported: in a notebook it is there already
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


@functools.cache
def _bar_class() -> Any:
    # Imported when a bar is drawn, not before: most programs show none.
    if _is_notebook():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning of missing widgets: then the bar is text
            from tqdm.autonotebook import tqdm as base
    else:
        from tqdm import tqdm as base

    class Bar(base):  # type: ignore[type-arg]  # chosen at run time
        """tqdm's bar without its thread and its lock between processes: neither may outlive a load."""

        monitor_interval = 0
        _lock = threading.RLock()

    return Bar
