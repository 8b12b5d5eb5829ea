"""Promises of the readers of a plan that loads of DCP don't make use of: lifetimes, order, going back."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import boto3
import pytest

from mpreader import MultiprocessConstructor, PoolConfig, S3Client
from mpreader.config import KiB, MiB
from mpreader.errors import ObjectChanged
from mpreader.ranges import ItemRange

DATA = os.urandom(3 * MiB)


@pytest.fixture
def stored(bucket: str) -> str:
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="ckpt/f0", Body=DATA)
    client.close()
    return bucket


def planned(bucket: str, *ranges: tuple[int, int]) -> MultiprocessConstructor:
    """A constructor that was told a plan of these (offset, length) items of the file f0."""
    constructor = MultiprocessConstructor(pool_config=PoolConfig(workers=1, max_memory=2 * MiB, part_size=128 * KiB))
    items = [SimpleNamespace(storage_index=index) for index in range(len(ranges))]
    storage = {
        index: SimpleNamespace(relative_path="f0", offset=offset, length=length)
        for index, (offset, length) in enumerate(ranges)
    }
    constructor.set_item_ranges_by_file(items, storage, f"s3://{bucket}/ckpt")
    return constructor


def test_reader_outlives_its_constructor(stored: str) -> None:
    constructor = planned(stored, (0, len(DATA)))
    client = S3Client()
    with client.get_object(stored, "ckpt/f0", reader_constructor=constructor) as reader:
        start = bytes(reader.read(100))
        del constructor  # the last other user of the pool
        target = bytearray(len(DATA) - 100)
        assert reader.readinto(target) == len(target)
    assert start + target == DATA


def test_reader_survives_the_closing_of_its_constructor(stored: str) -> None:
    constructor = planned(stored, (0, len(DATA)))
    with S3Client().get_object(stored, "ckpt/f0", reader_constructor=constructor) as reader:
        constructor.close()
        assert bytes(reader.read(len(DATA))) == DATA


def test_workers_stay_warm_for_the_next_reader_until_one_is_closed(stored: str) -> None:
    pids = []
    for _ in range(2):
        constructor = planned(stored, (0, 1000))
        with S3Client().get_object(stored, "ckpt/f0", reader_constructor=constructor) as reader:
            assert bytes(reader.read(1000)) == DATA[:1000]
        pool = constructor._get_pool()
        assert pool.coordinator is not None
        pids.append(pool.coordinator.workers.pids)
        last, constructor = constructor, None  # type: ignore[assignment]  # dropped, not closed
    assert pids[0] == pids[1]
    last.close()
    assert not pool.is_running


def test_a_gap_that_costs_more_than_a_request_is_not_fetched(stored: str) -> None:
    last = len(DATA) - 1000
    constructor = planned(stored, (0, 1000), (2000, 1000), (last, 1000))  # 2 MiB and more lie in between
    with S3Client().get_object(stored, "ckpt/f0", reader_constructor=constructor) as reader:
        for start in (0, 2000, last):
            reader.seek(start)
            assert bytes(reader.read(1000)) == DATA[start : start + 1000]
    assert constructor._get_pool().stats().bytes == 4000


def test_read_within_a_part_is_a_view_that_outlives_the_reader(stored: str) -> None:
    with S3Client().get_object(stored, "ckpt/f0", reader_constructor=planned(stored, (1000, 50), (1050, 50))) as reader:
        reader.seek(1000)
        view: object = reader.read(100)
    assert isinstance(view, memoryview)
    assert view.readonly
    assert view == DATA[1000:1100]


def test_reader_goes_back_within_an_item_and_refuses_what_was_given_back(stored: str) -> None:
    constructor = planned(stored, (0, 300_000), (300_000, 300_000))
    with S3Client().get_object(stored, "ckpt/f0", reader_constructor=constructor) as reader:
        for position in (299_000, 0, 150_000, 0):
            reader.seek(position)
            assert bytes(reader.read(1000)) == DATA[position : position + 1000]
        reader.seek(300_000)
        assert bytes(reader.read(300_000)) == DATA[300_000:600_000]
        reader.seek(0)
        with pytest.raises(ValueError, match="given back already: items must be read in the order of their offsets"):
            reader.read(1000)
        reader.seek(700_000)
        with pytest.raises(ValueError, match="not within the ranges of the load plan"):
            reader.read(1)
        with pytest.raises(ValueError, match="a size is needed"):
            reader.read()
    with pytest.raises(ValueError, match="closed"):
        reader.tell()


def test_reads_of_one_load_are_of_one_version_though_others_came_between(stored: str) -> None:
    files = [f"s3://{stored}/ckpt/{name}" for name in ("f0", "f1")]
    with contextlib.closing(boto3.client("s3")) as client:
        client.put_object(Bucket=stored, Key="ckpt/f1", Body=DATA)
    constructor = planned(stored, (0, 1000))
    begun = {uri: [ItemRange(0, 1000)] for uri in files}
    constructor.set_ranges_by_file(begun, {})
    for name in ("f0", "f1"):
        with S3Client().get_object(stored, f"ckpt/{name}", reader_constructor=constructor) as reader:
            assert bytes(reader.read(1000)) == DATA[:1000]
    with contextlib.closing(boto3.client("s3")) as client:
        client.put_object(Bucket=stored, Key="ckpt/f1", Body=DATA[::-1])
    for name in ("f0", "f1"):
        constructor.set_ranges_by_file({f"s3://{stored}/ckpt/{name}": [ItemRange(1000, 2000)]}, {}, continues=True)
        with S3Client().get_object(stored, f"ckpt/{name}", reader_constructor=constructor) as reader:
            reader.seek(1000)
            if name == "f0":
                assert bytes(reader.read(1000)) == DATA[1000:2000]
            else:
                with pytest.raises(ObjectChanged):
                    reader.read(1000)
    constructor.close()
