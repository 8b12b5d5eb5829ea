"""Timelines: every request is on one, connection by connection, in files that others read."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpreader import ConfigError, PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.testing import Fault, FaultKind, FaultServer
from mpreader.timeline import Timeline, record_timeline, timeline_to

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(2 * MiB)
CONFIG = PoolConfig(workers=2, connections_per_worker=2, part_size=64 * KiB)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA}) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _fonts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Before descriptors are counted: matplotlib keeps its fonts open."""
    if importlib.util.find_spec("matplotlib") is not None:
        Timeline().save(tmp_path_factory.mktemp("fonts") / "first.png")


def _fetch(server: FaultServer) -> None:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_object(server.url("/object") + "?X-Amz-Signature=secret")


def _fetch_and_fail(server: FaultServer) -> None:
    _fetch(server)
    raise ZeroDivisionError


def test_trace_has_each_request_on_its_connection_and_no_two_at_a_time(server: FaultServer, tmp_path: Path) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, at=(5,), after_bytes=1000))
    with record_timeline() as timeline:
        _fetch(server)
    timeline.save(tmp_path / "trace.json")
    text = (tmp_path / "trace.json").read_text()
    slices = [event for event in json.loads(text)["traceEvents"] if event["ph"] == "X"]
    requests = [event for event in slices if event["args"]]
    assert len(requests) == sum(request.method == "GET" for request in server.requests) == 33
    assert sum(event["args"]["received"] for event in requests) == len(DATA)
    assert [event["args"]["outcome"] for event in requests].count("broken") == 1
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in requests:
        lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(lanes) <= 4
    for spans in lanes.values():
        spans.sort()
        assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(spans))
    assert min(event["ts"] for event in requests) == 0
    assert "secret" not in text


def test_trace_names_workers_and_connections(server: FaultServer, tmp_path: Path) -> None:
    with timeline_to(tmp_path / "trace.json"):
        _fetch(server)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    used = {(event["pid"], event["tid"]) for event in events if event["ph"] == "X"}
    assert names >= {f"worker {pid - 1}" for pid, _ in used} | {f"connection {tid}" for _, tid in used}


def test_picture_is_a_png_that_grows_with_the_connections(server: FaultServer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with record_timeline() as timeline:
        _fetch(server)
    timeline.save(tmp_path / "few.png")
    crowd = Timeline()
    crowd._events.extend(
        event._replace(worker=worker, connection=connection)
        for worker, event in enumerate(timeline.events[:8])
        for connection in range(8)
    )
    crowd.save(tmp_path / "many.png")
    Timeline().save(tmp_path / "none.png")
    sizes = {path.stem: _png_size(path) for path in tmp_path.glob("*.png")}
    assert {width for width, _ in sizes.values()} == {1200}
    assert sizes["many"][1] > 2 * sizes["few"][1] > 400
    assert list(tmp_path.glob(".*")) == [], "nothing temporary is left"


def _png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_only_what_ends_while_it_is_recorded_is_on_it(server: FaultServer) -> None:
    _fetch(server)
    with record_timeline() as timeline:
        pass
    _fetch(server)
    assert timeline.events == ()


def test_a_wrong_path_is_found_before_the_work(tmp_path: Path) -> None:
    ran = []
    for path, says in (("trace.txt", r"\.png .* or \.json"), ("none/trace.json", "no folder")):
        with pytest.raises(ConfigError, match=says), timeline_to(tmp_path / path):
            ran.append(path)
    assert not ran


def test_timeline_of_work_that_fails_is_saved(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), timeline_to(tmp_path / "trace.json"):
        _fetch_and_fail(server)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


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
