"""Finding: one thing that the doctor looked at, and what mends it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``"ok"``; ``"warn"``: it works, but worse than it could; ``"fail"``: it does not.
        value: What was found.
        problem: What is wrong with it; None if nothing is.
        remedy: The command, or the setting, that mends it; None if nothing is wrong.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    problem: str | None = None
    remedy: str | None = None
