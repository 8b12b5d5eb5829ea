"""Control of Python's garbage collector: avoids collections that would take time and find nothing.

Used where many objects are made that stay alive, such as the plan of a load or a client of boto3. The collector's
settings belong to the user's program, so every change must be undone.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

__all__ = ["collector_paused", "spare_new_objects"]

# A program that freezes objects freezes all that there are, which is more than 4,000 in the smallest one. Python 3.12
# itself hides its immortal ones, the bases of its own types: fewer than 400, at each full collection.
_FEWEST_OF_A_PROGRAM: Final = 1000
_is_program_freezing = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Disable the collector in the block. For short work that makes many objects and no garbage.

    While 100,000 objects are made, the collector goes several times through all objects of the program, which takes
    0.14 s each time with torch loaded. A client of boto3 is made in 0.04 s without it. The block must be short: the
    collector is disabled for all threads, and their garbage cycles pile up meanwhile.
    """
    was_enabled = gc.isenabled()  # a program that has disabled the collector must find it disabled
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def spare_new_objects() -> None:
    """Move all new objects to the collector's oldest generation, as if they had survived its collections already.

    Otherwise the collector soon goes through them once for each of its three generations, and the third time through
    all other objects of the program as well: for the plan of 10,000 tensors this takes a third of the whole load. A
    garbage cycle among the new objects is found at the next full collection.
    """
    # freeze() hides all objects from the collector, unfreeze() puts all hidden ones into the oldest generation. If the
    # program itself has frozen objects, unfreeze() would release those as well, so nothing is done. What Python has
    # hidden may be released: it hides that again.
    global _is_program_freezing
    if _is_program_freezing:
        return
    # This counts them one by one, which takes half a second for some millions: it is not asked again.
    _is_program_freezing = gc.get_freeze_count() >= _FEWEST_OF_A_PROGRAM
    if not _is_program_freezing:
        gc.freeze()
        gc.unfreeze()
