"""Report of a load: its numbers on the reader, one line at INFO, and a progress bar if one was asked for."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import AsyncRangeFetcher, ConfigError, PoolConfig, RangeFetcher, S3ReaderConstructor
from mpreader.dcp import S3StorageReader, S3StorageWriter
from mpreader.telemetry.progress import Progress
from mpreader.testing import FaultServer, S3Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

POOL = PoolConfig(workers=1, connections_per_worker=2, part_size=64 * 1024)
STATE = {f"layer{number}": torch.full((100, 100), number, dtype=torch.float32) for number in range(4)}
NBYTES = 4 * 100 * 100 * 4


@pytest.fixture
def checkpoint(s3_server: S3Server, aws_environment: None, bucket: str) -> str:
    path = f"s3://{bucket}/reported"
    save(STATE, storage_writer=S3StorageWriter("us-east-1", path), no_dist=True)
    return path


def test_each_load_has_its_own_numbers_and_one_line(
    s3_server: S3Server, checkpoint: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mpreader")
    before = len(s3_server.requests)
    with S3StorageReader("us-east-1", checkpoint, pool_config=POOL) as reader:
        assert reader.stats.requests == 0
        everything = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
        load(everything, storage_reader=reader, no_dist=True)
        first = reader.stats
        load({"layer2": torch.zeros((100, 100))}, storage_reader=reader, no_dist=True)
        second = reader.stats
    assert NBYTES < first.bytes < 2 * NBYTES
    assert first.bytes / 5 < second.bytes < first.bytes / 3
    gets = [request for request in s3_server.requests[before:] if request.method == "GET" and "distcp" in request.path]
    assert first.requests + second.requests == len(gets)
    assert [worker.bytes for worker in first.workers] == [first.bytes]
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(lines) == 2
    assert re.fullmatch(
        rf"loaded {checkpoint} in [\d.]+ s: {first.bytes} bytes in {first.requests} requests by 1 workers, 0 retries, "
        r"0 bytes over-read \(0\.0 %\), waited [\d.]+ s for the network and [\d.]+ s for the consumer; "
        rf"{first.bytes} bytes were verified, 0 were not",
        lines[0],
    )


@pytest.mark.parametrize("progress", [True, False, None])
def test_bar_is_shown_when_it_is_asked_for(
    checkpoint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, progress: bool | None
) -> None:
    monkeypatch.setattr("mpreader.telemetry.progress._DELAY_S", 0.0)  # else such a small load shows none
    with S3StorageReader("us-east-1", checkpoint, pool_config=POOL, progress=progress) as reader:
        load({name: torch.zeros_like(tensor) for name, tensor in STATE.items()}, storage_reader=reader, no_dist=True)
    shown = capsys.readouterr().err
    assert ("load: 100%" in shown) is (progress is True), shown  # None: stderr is no terminal here


def test_bar_belongs_to_the_constructor_that_is_given(aws_environment: None) -> None:
    constructor = S3ReaderConstructor.multiprocess(progress=True)
    with pytest.raises(ConfigError, match="give progress to the reader_constructor"):
        S3StorageReader("us-east-1", "s3://bucket/x", reader_constructor=constructor, progress=True)


def test_bar_moves_while_one_large_piece_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpreader.telemetry.progress._DELAY_S", 0.0)
    shown: list[int] = []

    class Bar(Progress):
        def advance_to(self, done_bytes: int) -> None:
            shown.append(done_bytes)
            super().advance_to(done_bytes)

    monkeypatch.setattr("mpreader.telemetry.progress.Progress", Bar)
    data = bytes(4 << 20)
    config = PoolConfig(workers=1, connections_per_worker=2, part_size=256 * 1024)
    with (
        FaultServer({"/object": data}, bytes_per_s=2e6) as server,
        RangeFetcher(pool_config=config, progress=True) as fetcher,
    ):
        fetcher.fetch_object(server.url("/object"))
        alone = [*shown]
        asyncio.run(_fetch(server, config))
    assert [done for done in alone if 0 < done < len(data)], alone
    assert [done for done in shown[len(alone) :] if 0 < done < len(data)], shown
    assert alone[-1] == shown[-1] == len(data)


async def _fetch(server: FaultServer, config: PoolConfig) -> None:
    async with AsyncRangeFetcher(pool_config=config, progress=True) as fetcher:
        await fetcher.fetch_object(server.url("/object"))
