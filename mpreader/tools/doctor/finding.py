"""Finding: the result of one check of the doctor, with the remedy if something is wrong."""

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
        remedy: The command, or the setting, that mends it; None if there is no fault.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    problem: str | None = None
    remedy: str | None = None
