"""OpenTelemetry metrics: the numbers are those of the fetcher, and no series is added for each object."""

from __future__ import annotations

import os
from typing import Any

import boto3
import pytest

from mpreader import PoolConfig, RangeFetcher
from mpreader.config import KiB, MiB
from mpreader.telemetry import instrument
from mpreader.testing import Fault, FaultKind, FaultServer

metrics = pytest.importorskip("opentelemetry.sdk.metrics")
export = pytest.importorskip("opentelemetry.sdk.metrics.export")

CONFIG = PoolConfig(workers=1, connections_per_worker=2, part_size=64 * KiB)


def _points(reader: Any) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    found = data.resource_metrics[0].scope_metrics[0].metrics if data is not None else []
    return {metric.name: list(metric.data.data_points) for metric in found}


def test_metrics_are_the_fetchers_numbers() -> None:
    data = os.urandom(MiB)
    reader = export.InMemoryMetricReader()
    provider = metrics.MeterProvider([reader], shutdown_on_exit=False)
    end = instrument(provider)
    fault = Fault(FaultKind.STATUS, at=(3,), status=503)
    with FaultServer({"/a": data, "/b": data}, [fault]) as server, RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_object(server.url("/a"))
        fetcher.fetch_object(server.url("/b"))
        stats = fetcher.stats
        points = _points(reader)
        end()
        end()
        fetcher.fetch_object(server.url("/a"))
    assert [point.value for point in _points(reader)["mpreader.received"]] == [2 * MiB], "it had ended"
    [received] = points["mpreader.received"]
    [retried] = points["mpreader.retries"]
    assert (received.value, retried.value) == (stats.bytes, stats.retries) == (2 * MiB, 1)
    assert dict(received.attributes) == {"server.address": "127.0.0.1"}
    durations = points["mpreader.request.duration"]
    assert {point.attributes.get("error.type"): point.count for point in durations} == {None: 32, "busy": 1}
    waits = points["mpreader.request.time_to_first_byte"]
    assert 0 < sum(point.sum for point in waits) <= sum(point.sum for point in durations)
    provider.shutdown()


def test_s3_is_told_by_bucket_not_by_key(aws_environment: None, bucket: str) -> None:
    client = boto3.client("s3")
    for key in ("one", "two"):
        client.put_object(Bucket=bucket, Key=key, Body=b"content")
    client.close()
    reader = export.InMemoryMetricReader()
    provider = metrics.MeterProvider([reader], shutdown_on_exit=False)
    end = instrument(provider)
    with RangeFetcher(pool_config=CONFIG) as fetcher:
        fetcher.fetch_many({f"s3://{bucket}/one": None, f"s3://{bucket}/two": None})
    end()
    [received] = _points(reader)["mpreader.received"]
    assert (received.value, dict(received.attributes)) == (14, {"aws.s3.bucket": bucket})
    provider.shutdown()
