"""Sweep: the recommended settings are the leanest of the fast ones, and measurements are what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mpreader import S3Client
from mpreader.config import KiB, MiB, PoolConfig, S3ClientConfig
from mpreader.errors import ConfigError, ObjectMissing, PlanError, PoolTimeout
from mpreader.telemetry.events import RequestEvent, add_observer, remove_observer
from mpreader.testing import Fault, FaultKind, FaultServer
from mpreader.tools.bench.measurement import Benchmark, Measurement, Settings
from mpreader.tools.bench.objects import SourceObject, find_objects, passes
from mpreader.tools.bench.sweep import AXES, Results, Sweep, recommend, search, sweep

_DATA = bytes(range(256)) * 8192  # 2 MiB
_USUAL = Settings(4, 16, 8 * MiB)


def measured(*gb_per_s: float) -> list[Measurement]:
    return [Measurement(int(rate * 1e9), 1.0, 0.5, 10, 0, 100) for rate in gb_per_s]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/data": _DATA, "/empty": b""}) as server:
        yield server


@pytest.fixture
def events() -> Iterator[list[RequestEvent]]:
    """Every request of this process's workers."""
    seen: list[RequestEvent] = []
    add_observer(seen.append)
    yield seen
    remove_observer(seen.append)


# -- the recommendation


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ({Settings(1, 4, MiB): measured(1.0), Settings(2, 4, MiB): measured(2.0)}, Settings(2, 4, MiB)),
        ({Settings(1, 4, MiB): measured(1.94), Settings(2, 4, MiB): measured(2.0)}, Settings(1, 4, MiB)),
        ({Settings(1, 4, MiB): measured(1.93), Settings(2, 4, MiB): measured(2.0)}, Settings(2, 4, MiB)),
        ({Settings(1, 4, 8 * MiB): measured(2.0), Settings(1, 4, MiB): measured(1.99)}, Settings(1, 4, MiB)),
        ({Settings(2, 2, MiB): measured(2.0), Settings(1, 4, MiB): measured(1.99)}, Settings(1, 4, MiB)),
        # Medians: one lucky measurement makes nothing fast, one unlucky one nothing slow.
        ({Settings(1, 1, MiB): measured(1, 1, 9), Settings(2, 1, MiB): measured(2, 0.1, 2)}, Settings(2, 1, MiB)),
    ],
)
def test_recommended_is_the_leanest_of_what_is_as_fast_as_the_best(results: Results, best: Settings) -> None:
    assert recommend(results) == best


@pytest.mark.parametrize(("rate", "are_fine"), [(2.1, True), (1.95, True), (1.9, False)])
def test_defaults_are_fine_within_three_percent_of_the_best(rate: float, are_fine: bool) -> None:
    results = {_USUAL: measured(rate), Settings(1, 1, MiB): measured(2.0)}
    assert Sweep("s3://b/k", 1, 1, 1, 1, _USUAL, {"round": results}, {}).defaults_are_fine is are_fine


# -- the search


class Host:
    """Pretends to measure: each connection brings 0.1 GB/s up to what the host can take."""

    def __init__(self, most_gb_per_s: float) -> None:
        self.most = most_gb_per_s
        self.calls: list[tuple[str, list[Settings]]] = []

    def measure(self, name: str, settings: Sequence[Settings]) -> Results:
        self.calls.append((name, list(settings)))
        return {each: measured(min(self.most, 0.1 * each.connections)) for each in settings}


_GRID = {"workers": [1, 2, 4], "connections_per_worker": [4, 8, 16], "part_size": [4 * MiB, 8 * MiB]}


def test_search_sweeps_one_setting_after_the_other_from_what_was_enough() -> None:
    host = Host(0.8)
    rounds, axes = search(_GRID, _USUAL, host.measure)
    assert host.calls == [
        ("workers", [Settings(1, 16, 8 * MiB), Settings(2, 16, 8 * MiB), _USUAL]),
        ("connections per worker", [*(Settings(1, count, 8 * MiB) for count in (4, 8, 16)), _USUAL]),
        ("part size", [Settings(1, 8, 4 * MiB), Settings(1, 8, 8 * MiB), _USUAL]),
        ("final round", [Settings(1, 16, 8 * MiB), Settings(1, 8, 8 * MiB), Settings(1, 8, 4 * MiB), _USUAL]),
    ]
    assert [(name, list(results)) for name, results in rounds.items()] == host.calls
    assert list(axes) == list(AXES)
    assert list(axes["connections_per_worker"].results) == host.calls[1][1][:3]
    assert [len(each.defaults) for each in axes.values()] == [1, 1, 1]


def test_search_of_everything_measures_every_combination_once() -> None:
    host = Host(100)
    usual = Settings(3, 16, 8 * MiB)
    rounds, axes = search(_GRID, usual, host.measure, full=True)
    assert list(rounds) == ["all settings"]
    assert len(host.calls[0][1]) == 3 * 3 * 2 + 1
    assert recommend(rounds["all settings"]) == Settings(4, 16, 4 * MiB)
    assert list(axes["workers"].results) == [Settings(count, 16, 4 * MiB) for count in (1, 2, 4)]


def test_search_of_single_values_measures_them_and_the_defaults() -> None:
    rounds, axes = search({axis: [getattr(_USUAL, axis) * 2] for axis in AXES}, _USUAL, Host(100).measure)
    assert [list(results) for results in rounds.values()] == [[Settings(8, 32, 16 * MiB), _USUAL]]
    assert [list(each.results) for each in axes.values()] == [[Settings(8, 32, 16 * MiB)]]


def test_search_compares_only_what_was_measured_together() -> None:
    host = Host(0.4)

    def measure(name: str, settings: Sequence[Settings]) -> Results:
        host.most *= 0.7  # something else begins to take more and more of the host
        return host.measure(name, settings)

    rounds, _ = search(_GRID, _USUAL, measure)
    done = Sweep("s3://b/k", 1, 1, 1, 1, _USUAL, rounds, {})
    assert done.recommended == Settings(1, 4, 4 * MiB)
    assert done.defaults_are_fine
    assert done.best_gb_per_s == pytest.approx(0.4 * 0.7**4)


# -- what is read


@pytest.mark.parametrize(("nbytes", "count"), [(1, 1), (350, 1), (351, 2), (1000, 3)])
def test_passes_hold_as_many_bytes_as_asked_for(nbytes: int, count: int) -> None:
    objects = [SourceObject("a", 250), SourceObject("b", 100)]
    done = list(passes(objects, nbytes, 64))
    sizes = {item.source: item.nbytes for item in objects}
    ranges = [(name, start, end) for one in done for name, pairs in one.items() for start, end in pairs]
    assert len(done) == count
    assert sum(end - start for _, start, end in ranges) == nbytes
    assert all(0 < end - start <= 64 and end <= sizes[name] for name, start, end in ranges)
    assert all(pairs == sorted(set(pairs)) for one in done for pairs in one.values())


def test_largest_objects_below_a_prefix_are_read(bucket: str) -> None:
    client = S3Client()
    for name, size in {"run/a": 10, "run/b": 300, "run/c": 200, "run/d": 0, "runs": 1000}.items():
        with client.put_object(bucket, name) as writer:
            writer.write(bytes(size))
    client.close()

    def found(key: str, nbytes: int) -> list[tuple[str, int]]:
        objects = find_objects(f"s3://{bucket}/{key}", nbytes, S3ClientConfig())
        return [(item.source.removeprefix(f"s3://{bucket}/"), item.nbytes) for item in objects]

    assert found("run/", 300) == [("run/b", 300)]
    assert found("run", 301) == [("run/b", 300), ("run/c", 200)]
    assert found("run", 10_000) == [("run/b", 300), ("run/c", 200), ("run/a", 10)]
    assert found("run/a", 10_000) == [("run/a", 10)]
    assert found("", 1) == [("runs", 1000)]
    with pytest.raises(PlanError, match="run/d is empty"):
        found("run/d", 1)
    for missing in ("ru", "ru/"):
        with pytest.raises(ObjectMissing, match=f"{bucket}/{missing}"):
            found(missing, 1)


# -- measurements


def test_measurement_asks_for_parts_of_the_size_with_the_workers_it_says(
    server: FaultServer, events: list[RequestEvent]
) -> None:
    benchmark = Benchmark([SourceObject(server.url("/data"), len(_DATA))], 5 * MiB, 60, S3ClientConfig())
    advanced: list[int] = []
    done = benchmark.measure(Settings(3, 2, 256 * KiB), advanced.append)
    asked = [request.range for request in server.requests if request.method == "GET"]
    sizes = [end - start + 1 for start, end in (map(int, text[6:].split("-")) for text in asked if text)]
    assert sizes.count(256 * KiB) == 20  # the 2 MiB twice and a half
    assert set(sizes) == {64 * KiB, 256 * KiB}  # the small ones warm the workers up
    assert {event.worker for event in events} == {0, 1, 2}
    assert {event.connection for event in events} <= {0, 1}
    assert (done.nbytes, done.requests, done.retries) == (5 * MiB, 20, 0)
    assert sum(advanced) == 5 * MiB
    assert done.memory_bytes > 256 * KiB
    assert 0 < done.cpu_seconds < 60


def test_measurement_of_a_few_bytes_does_not_wait_for_workers_that_have_nothing_to_do(server: FaultServer) -> None:
    server.put("/data", b"x")
    done = Benchmark([SourceObject(server.url("/data"), 1)], 3, 10, S3ClientConfig()).measure(Settings(2, 1, MiB), int)
    assert (done.nbytes, done.requests) == (3, 3)


def test_measurement_counts_retries(server: FaultServer) -> None:
    # The warm-up reads the first bytes of each half only.
    server.inject(Fault(FaultKind.RESET, covering=200_000, at=(1,)))
    benchmark = Benchmark([SourceObject(server.url("/data"), len(_DATA))], MiB, 60, S3ClientConfig())
    done = benchmark.measure(Settings(1, 1, 512 * KiB), int)
    assert (done.nbytes, done.retries) == (MiB, 1)


def test_sweep_that_is_too_slow_reads_less_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Settings(1, 1, 64 * KiB).environment().items():
        monkeypatch.setenv(name, value)
    with FaultServer({"/data": _DATA}, bytes_per_s=1e6) as server:
        grid = {"workers": [1], "connections_per_worker": [1], "part_size": [64 * KiB]}
        done = sweep(server.url("/data") + "?secret", grid=grid, seconds=0.6, repeat=1)
    assert done.defaults == Settings(1, 1, 64 * KiB)
    assert 0 < done.nbytes < done.wanted_nbytes == done.source_nbytes == len(_DATA)
    assert list(done.rounds["workers"]) == [done.defaults]
    assert done.source.endswith("/data")


def test_sweep_in_which_nothing_comes_ends_with_its_time(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPREADER_WORKERS", "1")
    monkeypatch.setenv("MPREADER_CONNECTIONS_PER_WORKER", "1")
    server.inject(Fault(FaultKind.STALL, covering=200_000, seconds=60))
    with pytest.raises(PoolTimeout, match=r"not one part was received in 0\.2 s: allow more seconds"):
        sweep(server.url("/data"), seconds=0.6, repeat=3)


def test_parts_that_memory_does_not_allow_are_not_measured_twice(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPREADER_MAX_MEMORY", "8MiB")  # for parts of 512 KiB
    grid = {"workers": [1], "connections_per_worker": [2], "part_size": [256 * KiB, 4 * MiB, 16 * MiB]}
    done = sweep(server.url("/data"), grid=grid, nbytes=MiB, repeat=2)
    assert [each.part_size for each in done.axes["part_size"].results] == [256 * KiB, 512 * KiB]


@pytest.mark.parametrize(
    "arguments",
    [
        {"nbytes": 0},
        {"seconds": 0},
        {"seconds": float("nan")},
        {"repeat": 0},
        {"grid": {"workers": [0]}},
        {"grid": {"workers": []}},
        {"grid": {"threads": [1]}},
        {"grid": {"part_size": [1]}},
    ],
)
def test_sweep_refuses_what_is_out_of_bounds(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        sweep("http://127.0.0.1:1/nobody-is-asked", **arguments)  # type: ignore[arg-type]


def test_settings_as_environment_are_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(3, 5, 320 * KiB)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings(*(PoolConfig().value(axis) for axis in AXES)) == settings


# -- the chart


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Any]]:
    """A chart's file and panels. Made once, before descriptors are counted: matplotlib keeps its fonts open."""
    chart = pytest.importorskip("mpreader.tools.bench.chart")
    rounds, axes = search(_GRID, _USUAL, Host(2.0).measure)
    shown = Sweep("s3://b/$x_{$/漢字/" + "k" * 200, 1, 1, 1, 1, _USUAL, rounds, axes)
    file = tmp_path_factory.mktemp("chart") / "chart.png"
    chart.save_chart(shown, file)
    return file.read_bytes(), chart.draw_sweep(shown).axes


def test_chart_is_a_png_whatever_the_key_is_called(drawn: tuple[bytes, list[Any]]) -> None:
    assert drawn[0].startswith(b"\x89PNG\r\n")


def test_chart_has_a_panel_for_each_swept_setting_and_marks_the_recommended_value(
    drawn: tuple[bytes, list[Any]],
) -> None:
    shown = [panel.get_title().partition("\n")[0] for panel in drawn[1]]
    assert shown == ["workers", "connections per worker", "part size"]
    ticks = [[label.get_text() for label in panel.get_xticklabels()] for panel in drawn[1]]
    assert ticks == [["1", "2", "4"], ["4", "8", "16"], ["4MiB", "8MiB"]]
    # At 0.1 GB/s a connection, 2 workers with 16 are the first that reach 2 GB/s.
    marked = [
        [round(bar.get_x() + bar.get_width() / 2) for bars in panel.containers[:1] for bar in bars]
        for panel in drawn[1]
    ]
    assert marked == [[1], [2], [0]]
