"""``mpreader load``: loads a checkpoint into memory, and prints the time and memory that it took.

:mod:`mpreader.tools.bench.loads` does the work.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import click

from mpreader.cli.checkpoint import checkpoint_options
from mpreader.cli.options import json_option, progress_option, timeline_option
from mpreader.cli.output import human_bytes, print_json, print_table
from mpreader.telemetry.timeline import timeline_to

if TYPE_CHECKING:
    from mpreader.tools.bench.loads import TimedLoad

__all__ = ["command"]

_HEADERS: Final = (
    *("load", "seconds", "GB/s", "received", "over-read", "GETs", "retries", "slow, cut"),
    *("network wait, s", "consumer wait, s", "extra memory"),
)


@click.command("load", short_help="Load a checkpoint into memory: verified, timed.")
@checkpoint_options
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True, help="How many loads.")
@click.option("--no-verify", is_flag=True, help="Do not check the CRC-32 of every tensor.")
@timeline_option
@progress_option
@json_option
def command(
    uri: str,
    settings: dict[str, Any],
    repeat: int,
    no_verify: bool,
    timeline: str | None,
    progress: bool | None,
    as_json: bool,
) -> None:
    """Load a checkpoint into memory, check it, and say how fast that was: what this host can do.

    Its memory is allocated before the clock starts, and used again by every load. The first load also starts the
    worker processes. All items are received whole, and compared with the CRC-32s that torch.save wrote; where there
    are none, the output says how many bytes were not verified. Items that are no tensors are never unpickled.

    \b
    Examples:
      mpreader load s3://my-bucket/checkpoint --repeat 3
      mpreader load s3://my-bucket/checkpoint --match 'model.layers.0.*' --workers 4 --json
      mpreader load s3://my-bucket/checkpoint --timeline load.png
    """  # noqa: D301  # click reads the \b
    with timeline_to(timeline):  # refuses a wrong path here, before torch is imported, which takes seconds
        from mpreader.dcp.checkpoint import LoadOptions
        from mpreader.tools.bench.loads import time_loads

        # No region: --region is in the settings already, as a field of s3client_config.
        options = LoadOptions(region=None, verify=not no_verify, weights_only=True, progress=progress, **settings)
        loads = list(time_loads(uri, options, repeat))
    if as_json:
        print_json(
            {
                "uri": uri,
                "is_verified": not any(load.unverified_nbytes for load in loads),
                "loads": [{**dataclasses.asdict(load), "gb_per_s": load.gb_per_s} for load in loads],
            }
        )
    else:
        _print(uri, loads, checked=not no_verify)


def _print(uri: str, loads: list[TimedLoad], *, checked: bool) -> None:
    verdict = _verdict(loads[-1]) if checked else "not verified"
    click.echo(f"{uri}: {human_bytes(loads[0].nbytes)} of tensors, {verdict}\n")
    print_table(_HEADERS, [_row(number, load) for number, load in enumerate(loads, start=1)])
    click.echo("(extra memory: what this process and its workers took besides the tensors; shared memory once)")


def _verdict(load: TimedLoad) -> str:
    if not load.unverified_nbytes:
        return "verified"
    verified, unverified = human_bytes(load.verified_nbytes), human_bytes(load.unverified_nbytes)
    return f"{verified} of the items verified, {unverified} not: they were saved without checksums"


def _row(number: int, load: TimedLoad) -> tuple[object, ...]:
    return (
        f"{number}, starts workers" if load.starts_workers else f"{number}",
        load.seconds,
        load.gb_per_s,
        human_bytes(load.received_nbytes),
        human_bytes(load.over_read_nbytes),
        load.requests,
        load.retries,
        load.slow_cut,
        load.network_wait_s,
        load.consumer_wait_s,
        human_bytes(load.extra_memory_bytes),
    )
