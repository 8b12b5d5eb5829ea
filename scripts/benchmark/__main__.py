"""Compares ways to load checkpoints from S3, and to fetch from it; nginx on this machine plays S3.

  scripts/bench               all contenders, interleaved: about half an hour on 2 cores
  scripts/bench --quick       one round of a few of them: 2 minutes
  scripts/bench scaling       a fetch with more and more workers and connections
  scripts/bench tail          loads from servers of which some answers are slow: a quarter of an hour
  scripts/bench ranks         loads by several ranks of one host: a quarter of an hour
  scripts/bench safetensors   loads of safetensors files: ten minutes
  scripts/bench big           memory over time of a load of 10.7 GB

The seconds compare ways of loading on one machine; they are not those of a load from AWS.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

# Must be set before numpy is imported: OpenBLAS would start threads, and measure.py forks this process, which is not
# safe for one with threads.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from big import CHECKPOINTS as BIG_CHECKPOINTS
from big import run_big
from cells import CONTENDERS, SERVERS, TITLES, WORKLOADS, Cell, choose
from charts import write_charts
from checkpoints import checkpoint_of, make_checkpoints
from compare import compare
from coordinator import print_coordinator_cost
from machine import machine_facts
from ranks import CASES as RANK_CASES
from ranks import CHECKPOINTS as RANKS_CHECKPOINTS
from ranks import RANK_CONTENDERS, measure_ranks
from ranks_report import report_ranks
from report import NOTES, goal_table, main_table, plain_text, write_json, write_markdown
from results import Results
from scaling import CHECKPOINTS as SCALING_CHECKPOINTS
from scaling import run_scaling
from servers import Servers
from tail import CASES, measure_tail
from tail import CHECKPOINTS as TAIL_CHECKPOINTS
from tail_report import report_tail
from tensor_loads import CHECKPOINTS as TENSOR_CHECKPOINTS
from tensor_loads import TENSOR_CASES, TENSOR_CONTENDERS, measure_tensors
from tensor_report import report_tensors

_COMMANDS: Final = ("compare", "scaling", "tail", "ranks", "safetensors", "big", "coordinator")
Command = Callable[[Servers, Path, Path, dict[str, Any]], None]


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    options = _parser().parse_args()
    cells = _cells(options)
    if options.list:
        print(*cells, sep="\n")
        return 0
    if options.command == "coordinator":  # needs neither checkpoints nor servers
        print_coordinator_cost()
        return 0
    if options.command == "compare" and not cells:
        print("nothing to run: no cell has all of that", file=sys.stderr)
        return 2
    commands: dict[str, tuple[set[str], Command]] = {
        "compare": ({checkpoint_of(cell.workload) for cell in cells}, _comparison(cells, options)),
        "scaling": (SCALING_CHECKPOINTS, run_scaling),
        "big": (BIG_CHECKPOINTS, run_big),
        "tail": (TAIL_CHECKPOINTS, _tail(options)),
        "ranks": (RANKS_CHECKPOINTS, _ranks(options)),
        "safetensors": (TENSOR_CHECKPOINTS, _safetensors(options)),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # cleans up, as Ctrl-C does
    try:
        _run(*commands[options.command], options)
    except KeyboardInterrupt:
        return 130
    return 0


def _run(checkpoints: set[str], command: Command, options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        data = options.data or stack.enter_context(tempfile.TemporaryDirectory(prefix="mpreader-bench-data-"))
        data = Path(data).resolve()
        make_checkpoints(data, checkpoints)
        # Before the measurements, so that a folder that can't be made does not cost half an hour.
        options.out.mkdir(parents=True, exist_ok=True)
        servers = stack.enter_context(Servers(data, tail=options.command == "tail"))
        print(f"{servers.kind} serves {data}", flush=True)
        if servers.kind != "nginx":
            print("nginx is not installed: a slower server takes its place, and more of the processors", flush=True)
        command(servers, data, options.out, machine_facts(servers.kind))


def _cells(options: argparse.Namespace) -> list[Cell]:
    return choose(
        quick=options.quick,
        everything=options.all,
        workloads=options.only,
        servers=options.servers,
        contenders=options.contenders,
    )


def _comparison(cells: list[Cell], options: argparse.Namespace) -> Command:
    rounds = 1 if options.quick else options.rounds

    def run(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
        _report(compare(cells, servers.sites, data, rounds), machine, out)

    return run


def _tail(options: argparse.Namespace) -> Command:
    rounds = 1 if options.quick else options.rounds

    def run(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
        report_tail(measure_tail(servers, data, options.rows, options.contenders, rounds), out, machine)

    return run


def _ranks(options: argparse.Namespace) -> Command:
    rounds = 1 if options.quick else options.rounds

    def run(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
        report_ranks(measure_ranks(servers, data, options.rows, options.contenders, rounds), out, machine)

    return run


def _safetensors(options: argparse.Namespace) -> Command:
    rounds = 1 if options.quick else options.rounds

    def run(servers: Servers, data: Path, out: Path, machine: dict[str, Any]) -> None:
        report_tensors(measure_tensors(servers, data, options.rows, options.contenders, rounds), out, machine)

    return run


def _report(results: Results, machine: dict[str, Any], out: Path) -> None:
    tables = [(main_table(results), 4), (goal_table(results), 1)]
    for table, text_columns in tables:
        print("\n" + plain_text(table, text_columns))
    print("\n" + NOTES)
    write_json(out / "results.json", results, machine)
    write_markdown(out / "results.md", tables, machine)
    where = f"http from nginx on the same {machine['cores']} cores; shorter is better"
    charts = write_charts(results, out, where)
    print("written:", *(out / "results.json", out / "results.md", *charts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, epilog=_names(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=_COMMANDS, default="compare")
    parser.add_argument("--quick", action="store_true", help="one round; a few cells where no others are chosen")
    parser.add_argument("--all", action="store_true", help="choose from the whole cross product: takes hours")
    parser.add_argument("--rounds", type=_at_least_one, default=5, metavar="N", help="timed rounds (default: 5)")
    parser.add_argument("--only", type=_some_of(WORKLOADS, {"load": "abcd", "fetch": "efg"}), default=(),
                        metavar="a,b,…", help="workloads; load and fetch stand for all of theirs")  # fmt: skip
    parser.add_argument("--servers", type=_some_of(SERVERS), default=(), metavar="plain,…", help="servers")
    parser.add_argument(
        "--contenders",
        type=_some_of({*CONTENDERS, *RANK_CONTENDERS, *TENSOR_CONTENDERS}),
        default=(),
        metavar="mpreader,…",
        help="contenders",
    )
    parser.add_argument("--rows", type=_some_of([case.key for case in (*CASES, *RANK_CASES, *TENSOR_CASES)]),
                        default=(), metavar="1,…", help="rows of tail, of ranks or of safetensors")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), metavar="DIR",
                        help="where tables, charts and JSON go (default: benchmark-results)")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the checkpoints here (up to 4 GB), and use them")
    parser.add_argument("--list", action="store_true", help="print the chosen cells, run nothing")
    return parser


def _names() -> str:
    groups = {
        "workloads": WORKLOADS,
        "servers": SERVERS,
        "contenders": {name: TITLES[name] for name in CONTENDERS},
        "rows of tail": {case.key: case.title for case in CASES},
        "rows of ranks": {case.key: case.title for case in RANK_CASES},
        "rows of safetensors": {case.key: case.title for case in TENSOR_CASES},
    }
    return "\n\n".join(
        "\n".join([f"{group}:", *(f"  {name:16} {title}" for name, title in known.items())])
        for group, known in groups.items()
    )


def _some_of(known: Collection[str], groups: Mapping[str, str] | None = None) -> Callable[[str], tuple[str, ...]]:
    """Type of an option for argparse: a list of names, with commas between them.

    Args:
        known: Names that may be given.
        groups: Names that stand for several of one letter each, such as ``{"load": "abcd"}``.
    """

    def parse(text: str) -> tuple[str, ...]:
        names = [name for word in text.split(",") for name in (groups or {}).get(word, [word])]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return tuple(names)

    return parse


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
