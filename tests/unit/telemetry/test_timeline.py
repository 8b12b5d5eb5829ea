"""Timelines: requests of any kind are where they belong, in files that others read."""

from __future__ import annotations

import itertools
import json
import struct
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mpreader import ConfigError
from mpreader.config import MiB
from mpreader.telemetry import events as telemetry_events
from mpreader.telemetry.events import RequestEvent
from mpreader.telemetry.timeline import Timeline, check_timeline_path, record_timeline, timeline_to

EVENT = RequestEvent("s3://bucket/key", 0, 0, 0, MiB, MiB, 100.0, 100.2, 101.0, "ok", 1)


@pytest.fixture(scope="module")
def _fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before descriptors are counted: matplotlib keeps its fonts open."""
    pytest.importorskip("matplotlib")
    Timeline().save(tmp_path_factory.mktemp("fonts") / "first.png")


def _recorded(events: Sequence[RequestEvent]) -> Timeline:
    with record_timeline() as timeline:
        _tell(events)
    return timeline


def _tell(events: Sequence[RequestEvent]) -> None:
    """As a pool's thread does."""
    for event in events:
        for observe in telemetry_events.observers:
            observe(event)


def _saved(timeline: Timeline, folder: Path) -> list[dict[str, Any]]:
    timeline.save(folder / "trace.json")
    trace: list[dict[str, Any]] = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return trace


def _spans_by_thread(events: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """Start and end of each, in nanoseconds; in order."""
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        end = event["ts"] + event["dur"]
        spans.setdefault((event["pid"], event["tid"]), []).append((round(event["ts"] * 1e3), round(end * 1e3)))
    return {thread: sorted(own) for thread, own in spans.items()}


def test_trace_splits_a_request_into_waiting_and_receiving(tmp_path: Path) -> None:
    silent = EVENT._replace(started_s=102.1, first_byte_s=103.3, ended_s=103.3, received=0, outcome="stalled")
    slices = [event for event in _saved(_recorded([EVENT, silent]), tmp_path) if event["ph"] == "X"]
    assert [(event["name"], event["ts"], event["dur"]) for event in slices] == [
        (f"0-{MiB}", 0, 1e6),
        ("wait for the first byte", 0, 2e5),
        ("receive", 2e5, 8e5),
        (f"stalled 0-{MiB}", 2.1e6, 1.2e6),
        ("wait for the first byte", 2.1e6, 1.2e6),
    ]


def test_pools_that_work_at_the_same_time_are_told_apart(tmp_path: Path) -> None:
    everyone = threading.Barrier(3, timeout=10)

    def work(event: RequestEvent) -> None:
        everyone.wait()
        _tell([event])
        everyone.wait()  # or one thread might end, and another be given its number

    meanwhile = EVENT._replace(started_s=100.5, first_byte_s=100.6, ended_s=102.0)
    later = EVENT._replace(started_s=103.0, first_byte_s=103.1, ended_s=104.0)
    with record_timeline() as timeline, ThreadPoolExecutor(3) as threads:
        list(threads.map(work, (EVENT, meanwhile, later)))
    trace = _saved(timeline, tmp_path)
    names = [event["args"]["name"] for event in trace if event["name"] == "process_name"]
    assert names == ["pool 0, worker 0", "pool 1, worker 0"], "pools one after the other share rows"
    spans = _spans_by_thread([event for event in trace if event["ph"] == "X" and event["args"]])
    assert sorted(map(len, spans.values())) == [1, 2]


@pytest.mark.usefixtures("_fonts")
def test_picture_is_a_png_that_grows_with_the_connections(tmp_path: Path) -> None:
    for name, workers, connections in (("few", 2, 2), ("many", 8, 16)):
        grid = itertools.product(range(workers), range(connections))
        events = [EVENT._replace(worker=worker, connection=number) for worker, number in grid]
        _recorded(events).save(tmp_path / f"{name}.png")
    Timeline().save(tmp_path / "none.png")
    sizes = {path.stem: _png_size(path) for path in tmp_path.glob("*.png")}
    assert {width for width, _ in sizes.values()} == {1800}
    assert 2000 > sizes["many"][1] > 2 * sizes["few"][1] > 1000
    assert _near(_pixels(tmp_path / "none.png")[130:250, 700:1100], (0, 0, 0)) > 100, "a text says that it is empty"
    assert list(tmp_path.glob(".*")) == [], "nothing temporary is left"


def _png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


@pytest.mark.usefixtures("_fonts")
def test_picture_shows_what_is_shorter_than_a_pixel(tmp_path: Path) -> None:
    short = [
        EVENT._replace(started_s=100 + at / 1000, first_byte_s=100.0001 + at / 1000, ended_s=100.0005 + at / 1000)
        for at in range(3000)
    ]
    failed = short[1500]._replace(first_byte_s=short[1500].ended_s, outcome="broken", received=0)
    blue, red = (42, 127, 191), (200, 53, 43)
    _recorded(short).save(tmp_path / "good.png")
    _recorded([*short[:1500], failed, *short[1501:]]).save(tmp_path / "bad.png")
    good, bad = _pixels(tmp_path / "good.png"), _pixels(tmp_path / "bad.png")
    # A line of pixels within the row, in the upper half: a mean of white, amber and blue, nowhere white.
    row = good[200, 300:1500]
    assert row.min(axis=1).max() < 245
    assert row[:, 0].min() > blue[0]
    assert _near(bad, red) > _near(good, red) + 100


def _pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).astype(int)


def _near(pixels: Any, color: tuple[int, int, int]) -> int:
    return int((abs(pixels - color).max(axis=2) < 30).sum())


def test_a_wrong_path_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    wrong = (("trace.txt", r"\.png .* or \.json"), ("none/trace.json", "no folder"), ("folder.json", "is a folder"))
    ran = []
    for path, says in wrong:
        with pytest.raises(ConfigError, match=says), timeline_to(tmp_path / path):
            ran.append(path)
    assert not ran
    check_timeline_path(tmp_path / "trace.JSON")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_without_matplotlib_only_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'mpreader\[plot\]'"):
        check_timeline_path(tmp_path / "picture.png")
    assert _saved(Timeline(), tmp_path) == []


def test_without_a_path_nothing_is_recorded(tmp_path: Path) -> None:
    with timeline_to(None):
        assert telemetry_events.observers == ()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("before")

    def fail(*_: object, **__: object) -> str:
        raise MemoryError

    monkeypatch.setattr("json.dumps", fail)
    with pytest.raises(MemoryError):
        Timeline().save(path)
    assert [found.name for found in tmp_path.iterdir()] == ["trace.json"]
    assert path.read_text() == "before"
