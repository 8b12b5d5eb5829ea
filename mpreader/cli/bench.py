"""``mpreader bench``: measures this host against a bucket, and prints the settings that it recommends.

:mod:`mpreader.tools.bench.sweep` measures. This module reads the arguments, and writes the result as a table with a
verdict, as JSON, or as a chart.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from mpreader.cli.options import BYTES, json_option, progress_option, s3_options
from mpreader.cli.output import human_bytes, print_json, print_table
from mpreader.config import MiB, format_bytes
from mpreader.tools.bench.measurement import Measurement, Settings
from mpreader.tools.bench.sweep import CONNECTIONS, DEFAULT_NBYTES, MAX_WORKERS, PART_SIZES, Results, Sweep, sweep

__all__ = ["command"]

_HEADERS: Final = (
    *("round", "workers", "connections", "part size", "GB/s", "min", "max"),
    *("CPU s/GB", "GETs", "retries", "memory", ""),
)
_SHORT_S: Final = 0.3  # medians of shorter measurements vary too much; the user is told
_WIDE: Final = 0.1  # likewise if rates with the same settings differ by more than this share of their median


class _List(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """List of values with commas between them."""

    name = "list"

    def __init__(self, item: click.ParamType) -> None:  # type: ignore[type-arg]
        self._item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read a list from the command line."""
        if isinstance(value, tuple):  # click also converts defaults, and values that are converted already
            return value
        return tuple(self._item.convert(item.strip(), param, ctx) for item in value.split(","))


_COUNTS: Final = _List(click.IntRange(1))


@click.command("bench", short_help="Find the fastest settings for this host and bucket.")
@click.argument("source")
@click.option(
    "--workers",
    type=_COUNTS,
    metavar="N,N,…",
    help=f"Worker processes to try.  [default: 1 to {MAX_WORKERS}, by cores]",
)
@click.option(
    "--connections",
    type=_COUNTS,
    metavar="N,N,…",
    help=f"Connections of a worker.  [default: {','.join(map(str, CONNECTIONS))}]",
)
@click.option(
    "--part-size",
    type=_List(BYTES),
    metavar="N,N,…",
    help=f"Bytes of one request.  [default: {','.join(map(format_bytes, PART_SIZES))}]",
)
@click.option("--full", is_flag=True, help="Try all combinations, not one setting after the other.")
@click.option(
    "--bytes",
    "nbytes",
    type=BYTES,
    help="How much is read for each measurement, again and again if the source has less.  "
    f"[default: {format_bytes(DEFAULT_NBYTES)}, or what the source has]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=15.0,
    show_default=True,
    help="About how long all measurements of one setting may take in a round; less is read where that is too little.",
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Measurements of each setting.")
@click.option("--chart", type=click.Path(dir_okay=False, writable=True), help="Draw the result into this file, a .png.")
@progress_option
@json_option
@s3_options
def command(
    source: str,
    workers: tuple[int, ...] | None,
    connections: tuple[int, ...] | None,
    part_size: tuple[int, ...] | None,
    chart: str | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure how fast this host reads from this bucket with different settings, and recommend some.

    SOURCE is s3://bucket/key, an http(s) URL, or s3://bucket/prefix, such as that of a checkpoint of DCP or of
    safetensors files, whose largest objects are read. Bytes are dropped as they come. Workers are tried first, then
    connections, then part sizes, each with what was found to be enough before; in a final round, the winners are
    measured once more. The defaults are measured together with all of them. Recommended are the fewest connections,
    and the smallest parts, that are at most 3 % slower than the best.

    \b
    Examples:
      mpreader bench s3://my-bucket/checkpoint --chart bench.png
      mpreader bench s3://my-bucket/model.safetensors
      mpreader bench s3://my-bucket/data.bin --workers 2,4,8 --connections 8,16 --bytes 4GiB --json
    """  # noqa: D301  # click reads the \b
    draw = _chart_writer(chart)
    # An option that is not given is left out: the sweep then chooses values around the host's defaults.
    asked = {"workers": workers, "connections_per_worker": connections, "part_size": part_size}
    done = sweep(source, grid={axis: values for axis, values in asked.items() if values}, **arguments)
    if chart:
        draw(done, chart)
    if as_json:
        print_json(_document(done))
    else:
        _print(done)
        if chart:
            click.echo(f"\n{chart} shows it")


def _chart_writer(chart: str | None) -> Any:
    """Function that draws the chart; found before anything is measured, so that no long measurement is in vain.

    Raises:
        click.UsageError: The chart can't be written to this place.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if chart is None:
        return None
    folder = Path(chart).parent
    if not chart.endswith(".png"):
        raise click.UsageError(f"--chart writes a .png, not {chart}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise click.UsageError(f"--chart can't be written: {folder} is no folder that you may write to")
    from mpreader.tools.bench.chart import save_chart  # imports matplotlib, which is optional and slow to import

    return save_chart


def _print(sweep: Sweep) -> None:
    for line in _introduction(sweep):
        click.echo(line)
    click.echo()
    rows = [_row(sweep, name, settings) for name, results in sweep.rounds.items() for settings in results]
    print_table(_HEADERS, rows)
    click.echo("(medians; compare within a round; memory: what workers and shared memory took)\n")
    for line in _verdict(sweep):
        click.echo(line)


def _introduction(sweep: Sweep) -> Iterator[str]:
    many = f"the {sweep.objects} largest objects of " if sweep.objects > 1 else ""
    yield f"{many}{sweep.source}: each measurement reads {human_bytes(sweep.nbytes)}"
    # The user asked for nbytes, but small sources, or slow ones, change what that means.
    if sweep.nbytes > sweep.source_nbytes:
        times = sweep.nbytes / sweep.source_nbytes
        yield f"the source has {human_bytes(sweep.source_nbytes)}: it is read {times:.3g} times, one after the other"
    if sweep.nbytes < sweep.wanted_nbytes:
        yield f"{human_bytes(sweep.wanted_nbytes)} would take longer than --seconds allows"
    # Otherwise "defaults" would be taken for mpreader's own.
    variables = [name for name in sweep.defaults.environment() if os.environ.get(name, "").strip()]
    if variables:
        yield f"the defaults are those of your environment: {', '.join(variables)}"


def _row(sweep: Sweep, round_name: str, settings: Settings) -> tuple[object, ...]:
    numbers = _numbers(sweep.rounds[round_name][settings])
    marks = {"recommended": settings == sweep.recommended, "defaults": settings == sweep.defaults}
    return (
        round_name,
        settings.workers,
        settings.connections_per_worker,
        settings.environment()["MPREADER_PART_SIZE"],
        numbers["gb_per_s"],
        numbers["min_gb_per_s"],
        numbers["max_gb_per_s"],
        numbers["cpu_s_per_gb"],
        round(numbers["requests"]),
        round(numbers["retries"]),
        human_bytes(numbers["memory_bytes"]),
        ", ".join(mark for mark, applies in marks.items() if applies),
    )


def _verdict(sweep: Sweep) -> Iterator[str]:
    best, numbers = sweep.recommended, _numbers(sweep.final_round[sweep.recommended])
    code = ", ".join(f"{name}={_in_python(value)}" for name, value in asdict(best).items())
    yield (
        f"recommended: {numbers['gb_per_s']:.2f} GB/s ({numbers['min_gb_per_s']:.2f} to "
        f"{numbers['max_gb_per_s']:.2f}), the best has {sweep.best_gb_per_s:.2f}"
    )
    yield f"  PoolConfig({code})"
    yield f"  {' '.join(f'{name}={value}' for name, value in best.environment().items())}"
    usual = _numbers(sweep.final_round[sweep.defaults])
    rate = f"{usual['gb_per_s']:.2f} GB/s ({usual['min_gb_per_s']:.2f} to {usual['max_gb_per_s']:.2f})"
    if sweep.defaults_are_fine:
        leaner = "" if best == sweep.defaults else "; those recommended are as fast, and leaner"
        yield f"the defaults are fine here: {rate}{leaner}"
    else:
        # Medians say that the defaults are slower, but one of their measurements was as fast as the best median.
        noisy = ", which they reached at times" if usual["max_gb_per_s"] >= sweep.best_gb_per_s else ""
        yield f"the defaults have {rate}, {1 - usual['gb_per_s'] / sweep.best_gb_per_s:.0%} below the best{noisy}"
    yield from _doubts(sweep)


def _doubts(sweep: Sweep) -> Iterator[str]:
    """Reasons for which the figures may not be trusted, each with the option that gives better ones."""
    everything = [measurements for results in sweep.rounds.values() for measurements in results.values()]
    spread = max(map(_spread, everything))
    shortest = min(statistics.median(each.seconds for each in measurements) for measurements in everything)
    if spread > _WIDE:
        yield f"measurements of the same settings differ by up to {spread:.0%}: --repeat more for steadier medians"
    if shortest < _SHORT_S:
        yield f"the shortest measurement took {shortest:.2f} s: more --bytes give steadier figures"
    if any(each.nbytes < sweep.nbytes for measurements in everything for each in measurements):
        yield "measurements of slow settings were cut off after twice their time: --seconds allows more"


def _document(sweep: Sweep) -> dict[str, Any]:
    return {
        "source": sweep.source,
        "objects": sweep.objects,
        "source_bytes": sweep.source_nbytes,
        "bytes_per_measurement": sweep.nbytes,
        "bytes_asked_for": sweep.wanted_nbytes,
        "best_gb_per_s": sweep.best_gb_per_s,
        "defaults": _entry(sweep.final_round, sweep.defaults),
        "defaults_are_fine": sweep.defaults_are_fine,
        "recommended": {**_entry(sweep.final_round, sweep.recommended), "environment": sweep.recommended.environment()},
        "rounds": [
            {"name": name, "results": [_with_measurements(results, settings) for settings in results]}
            for name, results in sweep.rounds.items()
        ],
    }


def _with_measurements(results: Results, settings: Settings) -> dict[str, Any]:
    measurements = [{**asdict(each), "gb_per_s": each.gb_per_s} for each in results[settings]]
    return {**_entry(results, settings), "measurements": measurements}


def _entry(results: Results, settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), **_numbers(results[settings])}


def _numbers(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Medians of the measurements, and the span of their rates."""
    rates = [each.gb_per_s for each in measurements]
    names = ("gb_per_s", "cpu_s_per_gb", "requests", "retries", "memory_bytes")
    medians = {name: statistics.median(getattr(each, name) for each in measurements) for name in names}
    return {**medians, "min_gb_per_s": min(rates), "max_gb_per_s": max(rates)}


def _spread(measurements: Sequence[Measurement]) -> float:
    numbers = _numbers(measurements)
    # A median of 0, of measurements that were cut off before the first part came, can't be divided by.
    return (numbers["max_gb_per_s"] - numbers["min_gb_per_s"]) / (numbers["gb_per_s"] or 1)


def _in_python(value: int) -> str:
    """Number as one would write it in a program: sizes as multiples of 1024 * 1024."""
    return f"{value // MiB} * 1024 * 1024" if value % MiB == 0 else str(value)
