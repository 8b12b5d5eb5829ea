"""Printing of the subcommands: tables for people, one JSON document for programs.

Everything goes to stdout; errors are printed by :mod:`mpreader.cli.main`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

__all__ = ["count", "human_bytes", "print_json", "print_limited", "print_table"]


def print_json(document: Any) -> None:
    """Print a JSON document."""
    click.echo(json.dumps(document, indent=2))


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print columns; those that hold numbers are aligned to the right.

    Args:
        headers: A title for each column.
        rows: Rows of one value for each header. Floats are printed with two decimals, whole numbers with commas
            between thousands, None as a dash, True and False as yes and no.
    """
    cells = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    is_right = [all(_is_number(row[index]) for row in rows) for index in range(len(headers))]
    for line in [list(headers), *cells]:
        click.echo(
            "  ".join(
                text.rjust(width) if right else text.ljust(width)
                for text, width, right in zip(line, widths, is_right, strict=True)
            ).rstrip()  # no blanks behind an empty last column
        )


def print_limited(headers: Sequence[str], rows: Sequence[Sequence[object]], limit: int) -> None:
    """Print an empty line and a table of at most ``limit`` rows (0: of all); nothing if there are no rows."""
    if not rows:
        return
    shown = rows[:limit] if limit else rows
    click.echo()
    print_table(headers, shown)
    if len(shown) < len(rows):
        click.echo(f"… and {len(rows) - len(shown):,} more (--limit 0 shows all)")


def count(number: int, what: str) -> str:
    """A number of things in words: ``1 file``, ``2,000 files``."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def human_bytes(number: float) -> str:
    """Bytes in decimal units, three digits: ``1.18 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 999.5:  # from here on three digits would round to 1000
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _is_number(value: object) -> bool:
    # A bool is an int for Python, but printed as a word. None stands for a number that is missing.
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
