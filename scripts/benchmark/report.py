"""Report of the results: tables as plain text and Markdown, and JSON. It computes no figures: results.py does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from cells import SERVERS, TITLES, WORKLOADS
from measure import RUNS, as_json
from results import GOALS, Results, Row

__all__ = ["goal_table", "main_table", "markdown", "plain_text", "write_aims", "write_json"]

Table = list[list[str]]
_NUMBERS_FROM: Final = 4  # first column of the main table that holds numbers
NOTES: Final = f"""\
Medians of the rounds. first: with everything it starts (client, pool, connections, lazy imports); again: a second time
in the same process, loads with a new reader object, fetches with the same client. ratio: seconds ÷ mpreader's. CPU: of
the process and its descendants, not of the server. extra MB: peak memory of the process tree beyond what there was
before the first, sampled every 10 ms in a round of its own; shared memory counted once, pages of the targets not at all
(of fresh ones neither), objects that are kept are. Targets: touched (written to before) or fresh (untouched: the load
pays for their page faults).
{chr(10).join(f"({key}) {title}" for key, title in WORKLOADS.items())}
{chr(10).join(f"{key}: {title}" for key, title in SERVERS.items())}
"""


def main_table(results: Results) -> Table:
    """A line for each cell, below a line of headings."""
    head = ["", "server", "targets", "contender", "first s", "again s", "ratio", "(again)", "CPU s/GB", "(again)",
            "extra MB", "(again)", "requests", "(again)"]  # fmt: skip
    return [head, *(_line(results, row) for row in results.rows)]


def _line(results: Results, row: Row) -> list[str]:
    cell = row.cell
    line = [cell.workload, cell.server, cell.targets, TITLES[cell.contender]]
    if not row.rounds:
        return [*line, row.note, *[""] * 9]  # the note takes the place of the ten figures below
    line += [_number(row.seconds(run), 2) for run in RUNS]
    line += [_number(results.ratio(row, run), 2) for run in RUNS]
    line += [_number(row.cpu_per_gb(run), 2) for run in RUNS]
    line += [_number(row.peak(run), 0, 1e6) for run in RUNS]
    return line + [_number(row.requests(run), 0) for run in RUNS]


def goal_table(results: Results) -> Table:
    """Table of the goals whose cells were measured, with the ratios that were reached."""
    table = [["goal (s3torchconnector ÷ mpreader, where nothing else is said)", "at least", "first", "again"]]
    for goal in GOALS:
        reached = [goal.reached(results, run) for run in RUNS]
        if any(reached):
            table.append([goal.title, f"{goal.least:g}", *(_verdict(ratio, goal.least) for ratio in reached)])
    return table


def _verdict(ratio: float | None, least: float) -> str:
    return "" if ratio is None else f"{ratio:.2f} {'✓' if ratio >= least else '✗'}"


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def plain_text(table: Table, text_columns: int = _NUMBERS_FROM) -> str:
    """Aligned columns: the first ``text_columns`` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for line in table:
        padded = [
            text.ljust(width) if index < text_columns else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown(table: Table, text_columns: int = _NUMBERS_FROM) -> str:
    """The table in Markdown, with the same alignment as :func:`plain_text`."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(table[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [table[0], rule, *table[1:]])


def write_aims(file: Path, heading: str, tables: Sequence[Table], notes: str, document: dict[str, Any]) -> None:
    """Print tables whose first column is text, and write them as ``FILE.md``, with notes; and FILE.json."""
    print("\n" + "\n\n".join(plain_text(table, 1) for table in tables) + "\n\n" + notes)
    file.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    text = "\n\n".join(markdown(table, 1) for table in tables)
    file.with_suffix(".md").write_text(f"# {heading}\n\n{text}\n\n{notes}")


def write_json(file: Path, results: Results, machine: dict[str, Any]) -> None:
    """Write every number that was measured; memory over time is that of the checking round."""
    file.write_text(json.dumps({"machine": machine, "rows": list(map(_row_json, results.rows)),
                                "goals": list(_goals_json(results))}, indent=1) + "\n")  # fmt: skip


def _row_json(row: Row) -> dict[str, Any]:
    record = asdict(row.cell) | {"nbytes": row.nbytes, "note": row.note}
    for run in RUNS:
        seconds = [runs[RUNS.index(run)].seconds for runs in row.rounds]
        record[run] = {
            "seconds": row.seconds(run),
            "seconds_min": min(seconds, default=None),
            "seconds_max": max(seconds, default=None),
            "cpu_s_per_gb": row.cpu_per_gb(run),
            "peak_extra_bytes": row.peak(run),
            "requests": row.requests(run),
        }
    record["rounds"] = [[as_json(run) for run in runs] for runs in row.rounds]
    record["memory_over_time"] = {run.name: run.samples for run in row.check}
    return record


def _goals_json(results: Results) -> Iterator[dict[str, Any]]:
    for goal in GOALS:
        yield {"goal": goal.title, "least": goal.least} | {run: goal.reached(results, run) for run in RUNS}


def write_markdown(file: Path, tables: Sequence[tuple[Table, int]], machine: dict[str, Any]) -> None:
    """Write all tables, and the meaning of their columns."""
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    parts = [markdown(table, columns) for table, columns in tables]
    file.write_text("\n\n".join(["# Benchmark of mpreader", *parts, NOTES.replace("\n", "  \n"), facts]) + "\n")
