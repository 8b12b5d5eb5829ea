"""Sweep: the recommended settings are the leanest of the fast ones; the chart shows what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mpreader.config import KiB, MiB, PoolConfig
from mpreader.errors import ConfigError
from mpreader.tools.bench.measurement import Measurement, Settings
from mpreader.tools.bench.sweep import AXES, Results, Sweep, recommend, search, sweep

_USUAL = Settings(4, 16, 8 * MiB)


def measured(*gb_per_s: float) -> list[Measurement]:
    return [Measurement(int(rate * 1e9), 1.0, 0.5, 10, 0, 100) for rate in gb_per_s]


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
