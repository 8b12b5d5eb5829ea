"""``mpreader demo``: saves and loads a checkpoint on this machine alone, and prints the comparison.

:mod:`mpreader.tools.demo` does the work.
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from mpreader.cli.options import BYTES, json_option
from mpreader.cli.output import human_bytes, print_json, print_table
from mpreader.config import PoolConfig

if TYPE_CHECKING:
    from mpreader.tools.demo import DemoLoad

__all__ = ["command"]


@click.command("demo", short_help="Save and load a checkpoint on this machine alone, and compare.")
@click.option(
    "--size-mb", type=click.IntRange(1), default=400, show_default=True, help="Size of the checkpoint in megabytes."
)
@click.option("--max-memory", type=BYTES, help="Shared memory of the pool, such as 64MiB.")
@click.option("--workers", type=click.IntRange(1), help="Worker processes of the pool.")
@click.option("--every-reader", is_flag=True, help="Load with the other kinds of readers, too.")
@json_option
def command(size_mb: int, max_memory: int | None, workers: int | None, every_reader: bool, as_json: bool) -> None:
    """Write a checkpoint to an embedded S3, load it back in several ways, compare every bit.

    Needs no network and no credentials. S3 is played by a process of this machine: compare the rows with each other,
    not with loads from AWS. Fails if any bit came back different.

    \b
    Examples:
      mpreader demo --size-mb 1200 --every-reader
      mpreader demo --workers 2 --max-memory 64MiB --json
    """  # noqa: D301  # click reads the \b
    pool_config = PoolConfig(workers=workers, max_memory=max_memory)
    # Checked here: only the server's process imports moto, and its ModuleNotFoundError would not get to the user.
    if find_spec("moto") is None:
        raise ModuleNotFoundError("the embedded S3 is moto's", name="moto")
    from mpreader.tools.demo import run_demo  # imports torch, for which --help should not wait

    loads, ranks = run_demo(
        size_mb, pool_config, every_reader=every_reader, report=_keep_quiet if as_json else click.echo
    )
    is_verified = not any(load.differing for load in loads)
    if as_json:
        print_json(
            {
                "size_bytes": loads[0].nbytes,
                "is_verified": is_verified,
                "loads": [_row(load) for load in loads],
                "ranks": {**dataclasses.asdict(ranks), "received_per_needed": ranks.received_per_needed},
            }
        )
    else:
        _print(loads)
        click.echo(f"\n{_verdict(loads)}")
        click.echo(
            f"{len(ranks.ranks)} ranks of this host needed {human_bytes(ranks.needed_nbytes)} each, and together "
            f"received {human_bytes(ranks.received_nbytes)}: {ranks.received_per_needed or 0:.2f} times as much"
        )
    if not is_verified:
        raise click.exceptions.Exit(1)


def _print(loads: list[DemoLoad]) -> None:
    click.echo()
    print_table(
        ("loaded with", "seconds", "GB/s", "extra memory", "bits"),
        [
            (load.way, load.seconds, load.gb_per_s, human_bytes(load.extra_memory_bytes), _row(load)["bits"])
            for load in loads
        ],
    )
    click.echo("(extra memory: what this process and its workers took besides the checkpoint; shared memory once)")


def _verdict(loads: list[DemoLoad]) -> str:
    differing = sorted({name for load in loads for name in load.differing})
    if differing:
        return f"NOT VERIFIED: {', '.join(differing)}"
    return f"verified: every bit of {len(loads)} loads is right"


def _row(load: DemoLoad) -> dict[str, Any]:
    return {
        "way": load.way,
        "seconds": load.seconds,
        "gb_per_s": load.gb_per_s,
        "extra_memory_bytes": load.extra_memory_bytes,
        "bits": "differ" if load.differing else "same",
        "differing": load.differing,
    }


def _keep_quiet(line: str) -> None:
    pass
