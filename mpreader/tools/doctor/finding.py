"""Finding: the result of one check of the doctor, with the remedy if something is wrong.

The checks make findings; ``mpreader doctor`` prints them, as lines or as JSON under the names of their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Attributes:
        name: Subject of the check, such as ``"shared memory"``.
        status: ``"ok"``; ``"warn"``: it works, but worse than it could; ``"fail"``: it does not.
        value: The state that was found.
        problem: The fault; None if there is none.
        remedy: A command or a setting that removes the fault; None if there is no fault.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    problem: str | None = None
    remedy: str | None = None
