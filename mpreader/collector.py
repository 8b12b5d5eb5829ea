"""Python's garbage collector: keeps it from running where it would take time and find nothing.

Used where many objects are made that stay, such as a load's plan or a client of boto3. It never changes the settings
that the program has chosen for the collector.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused", "spare_new_objects"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector from running in the block: for short work that makes many objects, and no garbage.

    On the way to 100,000 new objects the collector goes through everything that the program holds, again and again:
    with torch loaded this takes 0.14 s each time. A client of boto3 takes 0.06 s to make without it. The collector is
    the whole process's: in a block that lasts long, other threads' cycles would pile up.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def spare_new_objects() -> None:
    """Tell the collector that the objects made since it last ran are there to stay, without a look at them.

    Otherwise it soon goes through all of them three times, and the third time through everything else that the program
    holds: for the plan of 10,000 tensors a third of the whole load. A cycle among the new objects that does become
    garbage is found when the collector next goes through everything.
    """
    # Freezing moves all objects out of the collector's sight, unfreezing moves them to its oldest generation. Objects
    # that the program itself has frozen must stay so, which nothing but leaving all as it is can ensure.
    if not gc.get_freeze_count():
        gc.freeze()
        gc.unfreeze()
