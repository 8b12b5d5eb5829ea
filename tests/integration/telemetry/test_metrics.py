"""OpenTelemetry metrics: the numbers are those of the fetcher, and no series is added for each object."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader, S3StorageWriter
from mpreader.telemetry.events import LoadEvent, add_load_observer, remove_load_observer
from mpreader.telemetry.metrics import instrument
from mpreader.testing import Fault, FaultKind, FaultServer

metrics = pytest.importorskip("opentelemetry.sdk.metrics")
export = pytest.importorskip("opentelemetry.sdk.metrics.export")

CONFIG = PoolConfig(workers=1, connections_per_worker=2, part_size=64 * KiB)


class Reporter:
    """A provider, and what has been reported to it."""

    def __init__(self) -> None:
        self._reader = export.InMemoryMetricReader()
        self.provider = metrics.MeterProvider([self._reader], shutdown_on_exit=False)

    def points(self) -> dict[str, list[Any]]:
        data = self._reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else []
        return {metric.name: list(metric.data.data_points) for metric in found}

    def units(self) -> dict[str, str]:
        data = self._reader.get_metrics_data()
        return {metric.name: metric.unit for metric in data.resource_metrics[0].scope_metrics[0].metrics}

    def received(self) -> int:
        return sum(point.value for point in self.points().get("mpreader.received", []))


@pytest.fixture
def reporters() -> Iterator[tuple[Reporter, Reporter]]:
    both = Reporter(), Reporter()
    yield both
    for reporter in both:
        reporter.provider.shutdown()


def test_metrics_are_the_fetchers_numbers(reporters: tuple[Reporter, Reporter]) -> None:
    data = os.urandom(MiB)
    faults = [
        Fault(FaultKind.STATUS, at=(3,), status=503),
        Fault(FaultKind.EARLY_CLOSE, at=(7,), after_bytes=1000),
        Fault(FaultKind.CLOSE_ON_ACCEPT, at=(2,)),  # a worker's first connection
    ]
    end = instrument(reporters[0].provider)
    with FaultServer({}, faults) as server, RangeFetcher(pool_config=CONFIG) as fetcher:
        for path in ("/a", "/b"):
            # Weak, so that the first request has no If-Match, for which a worker would take the closed connection.
            server.put(path, data, {"ETag": 'W/"1"'})
        fetcher.fetch_object(server.url("/a"))
        fetcher.fetch_object(server.url("/b"))
        stats, points = fetcher.stats, reporters[0].points()
        address = urlsplit(server.endpoint_url)
        gets = sum(request.method == "GET" for request in server.requests)
    end()
    [received] = points["mpreader.received"]
    [retried] = points["mpreader.retries"]
    assert (received.value, retried.value) == (stats.bytes, stats.retries) == (2 * MiB, 3)
    assert dict(received.attributes) == {"server.address": "127.0.0.1", "server.port": address.port}
    requests = {point.attributes["mpreader.outcome"]: point.value for point in points["mpreader.requests"]}
    assert sum(requests.values()) == stats.requests == gets + 1, "the server never saw that of the closed connection"
    assert requests.pop("ok") == 32
    assert sum(requests.values()) == 3
    durations, waits = points["mpreader.request.duration"], points["mpreader.request.time_to_first_byte"]
    assert _counts(durations) == {None: 32, **requests}
    assert sum(_counts(waits).values()) == gets, "one had no answer"
    assert 0 < sum(point.sum for point in waits) <= sum(point.sum for point in durations)
    assert len(durations[0].explicit_bounds) > len([bound for bound in durations[0].explicit_bounds if bound >= 1]) + 5


def _counts(points: list[Any]) -> dict[str | None, int]:
    return {point.attributes.get("error.type"): point.count for point in points}


def test_a_provider_gets_each_request_once_until_the_last_end(reporters: tuple[Reporter, Reporter]) -> None:
    one, other = reporters
    first, second, third = instrument(one.provider), instrument(one.provider), instrument(other.provider)
    with FaultServer({"/a": b"content"}) as server, RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_object(server.url("/a"))
        assert (one.received(), other.received()) == (7, 7)
        first()
        first()
        third()
        fetcher.fetch_object(server.url("/a"))
        assert (one.received(), other.received()) == (14, 7)
        second()
        fetcher.fetch_object(server.url("/a"))
        assert (one.received(), other.received()) == (14, 7)
        instrument(one.provider)()
        again = instrument(one.provider)
        fetcher.fetch_object(server.url("/a"))
        again()
    assert (one.received(), other.received()) == (21, 7)


def test_the_global_provider_may_be_set_later() -> None:
    program = """
from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from mpreader import telemetry
from mpreader.telemetry import events as telemetry_events
reader = InMemoryMetricReader()
provider = MeterProvider([reader])
telemetry.instrument()
set_meter_provider(provider)
telemetry.instrument(provider)
for observe in telemetry_events.observers:
    observe(telemetry_events.RequestEvent("https://[::1]/key", 0, 0, 0, 7, 7, 1.0, 2.0, 3.0, "ok", 1))
[received] = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
print(received.value, dict(received.attributes))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("7 {'server.address': '::1', 'server.port': 443}\n", "")


def test_units_are_those_of_the_conventions(reporters: tuple[Reporter, Reporter]) -> None:
    end = instrument(reporters[0].provider)
    fault = Fault(FaultKind.STATUS, method="GET", at=(1,), status=503)
    with FaultServer({"/a": b"content"}, [fault]) as server, RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_object(server.url("/a"))
    end()
    assert reporters[0].units() == {
        "mpreader.received": "By",
        "mpreader.requests": "{request}",
        "mpreader.retries": "{request}",
        "mpreader.request.duration": "s",
        "mpreader.request.time_to_first_byte": "s",
    }


def test_s3_is_told_by_bucket_not_by_key(
    aws_environment: None, bucket: str, reporters: tuple[Reporter, Reporter]
) -> None:
    client = boto3.client("s3")
    for key in ("one", "two"):
        client.put_object(Bucket=bucket, Key=key, Body=b"content")
    client.close()
    end = instrument(reporters[0].provider)
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_many({f"s3://{bucket}/one": None, f"s3://{bucket}/two": None})
    end()
    points = reporters[0].points()
    [received] = points["mpreader.received"]
    assert (received.value, dict(received.attributes)) == (14, {"aws.s3.bucket": bucket})
    [requests] = points["mpreader.requests"]
    assert (requests.value, dict(requests.attributes)) == (2, {"aws.s3.bucket": bucket, "mpreader.outcome": "ok"})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("verify", [True, False])
def test_bytes_of_loads_are_told_by_whether_they_were_verified(
    bucket: str, reporters: tuple[Reporter, Reporter], caplog: pytest.LogCaptureFixture, verify: bool
) -> None:
    uri = f"s3://{bucket}/checkpoint"
    save({"weight": torch.ones(1000), "empty": torch.ones(0)}, storage_writer=S3StorageWriter(None, uri))

    def fail(event: LoadEvent) -> None:
        raise RuntimeError(event.uri)

    end = instrument(reporters[0].provider)
    add_load_observer(fail)
    with S3StorageReader(None, uri, pool_config=CONFIG, verify=verify) as reader:
        load({"weight": torch.zeros(1000), "empty": torch.ones(0)}, storage_reader=reader)
        stats = reader.stats
        end()
        remove_load_observer(fail)
        load({"weight": torch.zeros(1000)}, storage_reader=reader)
    [loaded] = reporters[0].points()["mpreader.loaded"]
    assert loaded.value == stats.bytes == (stats.verified_bytes if verify else stats.unverified_bytes)
    assert dict(loaded.attributes) == {"aws.s3.bucket": bucket, "mpreader.verified": verify}
    assert reporters[0].units()["mpreader.loaded"] == "By"
    [failed] = [record for record in caplog.records if record.message == "an observer of loads failed"]
    assert failed.exc_info is not None
    assert str(failed.exc_info[1]) == uri
