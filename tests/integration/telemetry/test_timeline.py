"""Timelines: every request is on one, connection by connection, in files that others read."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.telemetry.timeline import Timeline, record_timeline, timeline_to
from mpreader.testing import Fault, FaultKind, FaultServer

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(2 * MiB)
CONFIG = PoolConfig(workers=2, connections_per_worker=2, part_size=64 * KiB)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/object": DATA}) as server:
        yield server


def _fetch(server: FaultServer) -> None:
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_object(server.url("/object") + "?X-Amz-Signature=secret")


def _fetch_and_fail(server: FaultServer) -> None:
    _fetch(server)
    raise ZeroDivisionError


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


def test_trace_has_each_request_on_its_connection_and_no_two_at_a_time(server: FaultServer, tmp_path: Path) -> None:
    server.inject(Fault(FaultKind.EARLY_CLOSE, at=(5,), after_bytes=1000), Fault(FaultKind.STATUS, at=(9,), status=503))
    with record_timeline() as timeline:
        _fetch(server)
    slices = [event for event in _saved(timeline, tmp_path) if event["ph"] == "X"]
    requests = [event for event in slices if event["args"]]
    facts = [event["args"] for event in requests]
    assert len(requests) == sum(request.method == "GET" for request in server.requests) == 34
    assert sum(fact["received"] for fact in facts) == len(DATA)
    assert Counter(fact["outcome"] for fact in facts) == {"ok": 32, "broken": 1, "busy": 1}
    again = {fact["start"] for fact in facts if fact["attempt"] == 2}
    assert again == {fact["start"] + fact["received"] for fact in facts if fact["outcome"] != "ok"}
    spans = _spans_by_thread(requests)
    assert 1 <= len(spans) <= 4
    for own in spans.values():
        assert all(later[0] >= earlier[1] for earlier, later in itertools.pairwise(own))
    assert min(event["ts"] for event in requests) == 0
    assert "secret" not in (tmp_path / "trace.json").read_text()
    assert {fact["uri"] for fact in facts} == {server.url("/object")}


def test_trace_names_workers_and_connections(server: FaultServer, tmp_path: Path) -> None:
    with timeline_to(tmp_path / "trace.json"):
        _fetch(server)
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    workers = {event["pid"]: event["args"]["name"] for event in trace if event["name"] == "process_name"}
    threads = {event["tid"]: event["args"]["name"] for event in trace if event["name"] == "thread_name"}
    used = {(event["pid"], event["tid"]) for event in trace if event["ph"] == "X"}
    assert {pid for pid, _ in used} == set(workers)
    assert sorted(tid for _, tid in used) == sorted(threads)
    assert set(workers.values()) <= {"worker 0", "worker 1"}
    assert set(threads.values()) <= {"connection 0", "connection 1"}
    assert not {0, *workers} & set(threads), "Perfetto would take it for an idle or a main thread"


def test_only_what_ends_while_it_is_recorded_is_on_it(server: FaultServer) -> None:
    _fetch(server)
    with record_timeline() as timeline:
        pass
    _fetch(server)
    assert timeline.events == ()


def test_timeline_of_work_that_fails_is_saved(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), timeline_to(tmp_path / "trace.json"):
        _fetch_and_fail(server)
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
