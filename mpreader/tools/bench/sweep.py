"""Sweep: measures pool settings on this host and source, and recommends the leanest of the fast ones.

The fields of ``AXES`` are swept one after the other; while one is swept, the others keep their best values so far.
Settings that are compared are measured in one *round*: all of them once, then all of them again, so that other work of
the host and the service slows all of them alike. The defaults take part in every round, and the final round compares
the winners of the others. ``mpreader bench`` runs a sweep and prints it; this module prints nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mpreader.config import MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.sources.uri import without_secrets
from mpreader.telemetry.progress import progress_bar
from mpreader.tools.bench.measurement import Benchmark, Measurement, Settings
from mpreader.tools.bench.objects import find_objects

__all__ = [
    "AXES",
    "CONNECTIONS",
    "DEFAULT_NBYTES",
    "MAX_WORKERS",
    "PART_SIZES",
    "AxisResults",
    "Results",
    "Sweep",
    "median_rate",
    "recommend",
    "search",
    "sweep",
]

AXES: Final = ("workers", "connections_per_worker", "part_size")  # fields of Settings, in the order of the sweep
TOLERANCE: Final = 0.03  # rates that differ by less count as equal
FINAL_ROUND: Final = "final round"
DEFAULT_NBYTES: Final = 1024 * MiB

MAX_WORKERS: Final = 16
CONNECTIONS: Final = (4, 8, 16, 32)
PART_SIZES: Final = (4 * MiB, 8 * MiB, 16 * MiB)

Grid = Mapping[str, Sequence[int]]
Results = Mapping[Settings, Sequence[Measurement]]


@dataclass(frozen=True)
class AxisResults:
    """Results of settings that differ in one of ``AXES`` only.

    Attributes:
        results: Measurements of each of the settings.
        defaults: Measurements of the defaults, made in the same round.
    """

    results: Results
    defaults: Sequence[Measurement]


@dataclass(frozen=True)
class Sweep:
    """Results of a sweep.

    Attributes:
        source: The source, without secrets.
        nbytes: Bytes of one measurement.
        wanted_nbytes: Bytes that were asked for; more than ``nbytes`` where they would have taken too long.
        source_nbytes: Bytes of the objects that were read; where they are less than ``nbytes``, they were read again.
        objects: Number of these objects.
        defaults: Settings of a pool that is made without arguments, environment variables included.
        rounds: Results by the name of the round; the recommended settings are in the last one.
        axes: Results by axis, for each of ``AXES`` that was swept.
    """

    source: str
    nbytes: int
    wanted_nbytes: int
    source_nbytes: int
    objects: int
    defaults: Settings
    rounds: Mapping[str, Results]
    axes: Mapping[str, AxisResults]

    @property
    def final_round(self) -> Results:
        """Results of the round that decides; the defaults are in it."""
        return list(self.rounds.values())[-1]

    @property
    def recommended(self) -> Settings:
        """The leanest of the fast settings; see :func:`recommend`."""
        return recommend(self.final_round)

    @property
    def best_gb_per_s(self) -> float:
        """The highest median of the final round."""
        return max(map(median_rate, self.final_round.values()))

    @property
    def defaults_are_fine(self) -> bool:
        """True if the defaults are as fast as the best, within ``TOLERANCE``."""
        return median_rate(self.final_round[self.defaults]) >= (1 - TOLERANCE) * self.best_gb_per_s


def median_rate(measurements: Iterable[Measurement]) -> float:
    """Median of the rates, in gigabytes per second."""
    return statistics.median(measurement.gb_per_s for measurement in measurements)


def recommend(results: Results) -> Settings:
    """The leanest settings whose median rate is at most ``TOLERANCE`` below the best; see :attr:`Settings.cost`."""
    rates = {settings: median_rate(measurements) for settings, measurements in results.items()}
    enough = (1 - TOLERANCE) * max(rates.values())
    return min((settings for settings, rate in rates.items() if rate >= enough), key=lambda settings: settings.cost)


def sweep(
    source: str,
    *,
    grid: Grid | None = None,
    nbytes: int | None = None,
    seconds: float = 15.0,
    repeat: int = 3,
    full: bool = False,
    s3client_config: S3ClientConfig | None = None,
    progress: bool | None = False,
) -> Sweep:
    """Measure how fast this host reads a source with different settings.

    Args:
        source: ``s3://bucket/key``, an http(s) URL, or ``s3://bucket/prefix``, of which the largest objects are read.
        grid: Values to try by the names of ``AXES``. Axes that are missing get some around the host's defaults.
        nbytes: Bytes of each measurement. None: 1 GiB, or the whole source where that is less.
        seconds: Seconds that all measurements of one setting may take in a round, about; less is read where it would
            take longer, and a measurement ends after twice its share.
        repeat: Measurements of each setting in a round.
        full: Try every combination, not one setting after the other.
        s3client_config: Settings of the S3 client.
        progress: True: show a bar for each round; see :func:`~mpreader.telemetry.progress.progress_bar`.

    Raises:
        ConfigError: An argument is out of its bounds.
        PlanError: The source is empty.
        ObjectMissing: There is no such source.
        PoolTimeout: Not one part has come in the time for a measurement.
        MpreaderError: As for :meth:`mpreader.RangeFetcher.stream`.
    """
    _check_bounds(nbytes, seconds, repeat)
    s3client_config = s3client_config or S3ClientConfig()
    defaults = default_settings(s3client_config)
    values = _checked({**host_grid(defaults), **(grid or {})}, s3client_config)
    # The time for a setting is shared by its repetitions.
    found = find_objects(source, nbytes or DEFAULT_NBYTES, s3client_config)
    source_nbytes = sum(item.nbytes for item in found)
    wanted = nbytes or min(source_nbytes, DEFAULT_NBYTES)
    benchmark = Benchmark(found, wanted, seconds / repeat, s3client_config)
    with progress_bar(wanted, "calibrate", show=progress, leave=False) as bar:
        benchmark.calibrate(defaults, bar.advance)

    def measure(name: str, settings: Sequence[Settings]) -> Results:
        with progress_bar(benchmark.nbytes * len(settings) * repeat, name, show=progress, leave=False) as bar:
            # Not one setting's repetitions in a row: a slow minute of the service would hit that setting alone.
            repetitions = [[benchmark.measure(each, bar.advance) for each in settings] for _ in range(repeat)]
        return dict(zip(settings, zip(*repetitions, strict=True), strict=True))

    rounds, axes = search(values, defaults, measure, full=full)
    shown = without_secrets(source)
    return Sweep(shown, benchmark.nbytes, wanted, source_nbytes, len(found), defaults, rounds, axes)


def search(
    grid: Grid,
    defaults: Settings,
    measure: Callable[[str, Sequence[Settings]], Results],
    *,
    full: bool = False,
) -> tuple[Mapping[str, Results], Mapping[str, AxisResults]]:
    """Choose the settings that are worth measuring, from what the rounds before have shown.

    Args:
        grid: Values for each of ``AXES``, none of them empty.
        defaults: Settings that are measured in every round, together with the others.
        measure: Is called with the name of a round and its settings; returns their results.
        full: Measure every combination.

    Returns:
        The results by the name of the round, and the results by axis, for each axis that was swept.
    """
    rounds: dict[str, Results] = {}

    def run(name: str, settings: Iterable[Settings]) -> Results:
        # The defaults may be among the settings already: each is measured once in a repetition.
        rounds[name] = measure(name, list(dict.fromkeys([*settings, defaults])))
        return rounds[name]

    # The sweep starts from the values nearest to the defaults. An axis with one value has nothing to compare, but one
    # axis must be swept, or nothing would be measured.
    base = Settings(*(_nearest(grid[axis], getattr(defaults, axis)) for axis in AXES))
    swept = [axis for axis in AXES if len(grid[axis]) > 1] or [AXES[0]]
    if full:
        product = [Settings(*values) for values in itertools.product(*(grid[axis] for axis in AXES))]
        found = run("all settings", product)
        base = recommend({each: found[each] for each in product})  # the defaults may lie outside of the grid
        return rounds, {axis: _axis_results(_along(axis, base, grid), found, defaults) for axis in swept}
    axes: dict[str, AxisResults] = {}
    winners = []
    for axis in swept:
        settings = _along(axis, base, grid)
        axes[axis] = _axis_results(settings, run(axis.replace("_", " "), settings), defaults)
        base = recommend(axes[axis].results)
        winners.append(base)
    if len(swept) > 1:
        # Results of different rounds are not compared: the host or the service may have been busier in one of them.
        run(FINAL_ROUND, winners)
    return rounds, axes


def _along(axis: str, base: Settings, grid: Grid) -> list[Settings]:
    return [replace(base, **{axis: value}) for value in grid[axis]]


def _axis_results(settings: Sequence[Settings], found: Results, defaults: Settings) -> AxisResults:
    return AxisResults({each: found[each] for each in settings}, found[defaults])


def _nearest(values: Sequence[int], wanted: int) -> int:
    # By ratio, not by difference: the values grow as powers of two do.
    return min(values, key=lambda value: abs(math.log(value / wanted)))


# -- values to try


def default_settings(s3client_config: S3ClientConfig) -> Settings:
    """Settings of a pool that is made without arguments: from the environment variables, else from the host."""
    sizes = size_pool(PoolConfig(), s3client_config, Host.now())
    return Settings(sizes.workers, sizes.connections_per_worker, sizes.part_bytes)


def host_grid(defaults: Settings) -> dict[str, Sequence[int]]:
    """Values to try for each of ``AXES``, the defaults among them."""
    most = max(2, min(Host.now().cores, MAX_WORKERS))
    workers = [1 << power for power in range(most.bit_length())]
    return {
        "workers": (*workers, defaults.workers),
        "connections_per_worker": (*CONNECTIONS, defaults.connections_per_worker),
        "part_size": (*PART_SIZES, defaults.part_size),
    }


def _checked(grid: Grid, s3client_config: S3ClientConfig) -> dict[str, list[int]]:
    """The values in order, each once; part sizes as a pool on this host would really use them."""
    unknown, empty = [axis for axis in grid if axis not in AXES], [axis for axis in AXES if not grid[axis]]
    if unknown or empty:
        raise ConfigError(f"a grid has values for {', '.join(AXES)}; wrong: {', '.join(unknown or empty)}")
    configs = {axis: [PoolConfig(**{axis: value}) for value in grid[axis]] for axis in AXES}  # raises for wrong values
    host = Host.now()
    # Where memory is short, a pool uses smaller parts than it is told: two sizes may be the same, measured twice.
    parts = {size_pool(config, s3client_config, host).part_bytes for config in configs["part_size"]}
    return {**{axis: sorted(set(grid[axis])) for axis in AXES}, "part_size": sorted(parts)}


def _check_bounds(nbytes: int | None, seconds: float, repeat: int) -> None:
    if nbytes is not None and nbytes < 1:
        raise ConfigError(f"nbytes must be at least 1, got {nbytes}")
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds must be above 0, got {seconds}")
    if repeat < 1:
        raise ConfigError(f"repeat must be at least 1, got {repeat}")
