"""What holds settings is pickled as these: no secret travels, and the copy reads in a spawned or forked process."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import (
    AsyncRangeFetcher,
    PoolClosed,
    PoolConfig,
    RangeFetcher,
    S3Client,
    S3ClientConfig,
    S3ReaderConstructor,
)
from mpreader.dcp import S3FileSystem, S3StorageReader, S3StorageWriter

if TYPE_CHECKING:
    from tests.integration.warm_interpreter import WarmInterpreter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DATA = os.urandom(300_000)
POOL = PoolConfig(workers=1, connections_per_worker=2, max_memory=8 << 20)


@pytest.fixture
def uri(bucket: str) -> str:
    client = S3Client()
    with client.put_object(bucket, "o") as writer:
        writer.write(DATA)
    client.close()
    return f"s3://{bucket}/o"


def read_by_fetcher(fetcher: RangeFetcher, uri: str) -> bytes:
    with fetcher:
        return bytes(fetcher.fetch(uri, [(7, 1000)])[0])


def read_by_async_fetcher(fetcher: AsyncRangeFetcher, uri: str) -> bytes:
    import asyncio

    async def read() -> bytes:
        async with fetcher:
            return bytes((await fetcher.fetch(uri, [(7, 1000)]))[0])

    return asyncio.run(read())


def read_by_file_system(filesystem: Any, uri: str) -> bytes:
    return bytes(filesystem.cat_file(uri, 7, 1000))


def read_by_client(client: S3Client, uri: str) -> bytes:
    bucket, key = uri.removeprefix("s3://").split("/")
    with client.get_object(bucket, key) as reader:
        reader.seek(7)
        return bytes(reader.read(993))


def read_by_constructor(constructor: Any, uri: str) -> bytes:
    bucket, key = uri.removeprefix("s3://").split("/")
    client = S3Client()
    with client.get_object(bucket, key, reader_constructor=constructor) as reader:
        reader.seek(7)
        content = bytes(reader.read(993))
    client.close()
    return content


def with_ranges(constructor: Any, uri: str) -> Any:
    """Let a constructor know the one item of the one file."""
    stored = {0: SimpleNamespace(relative_path="o", offset=7, length=993)}
    constructor.set_item_ranges_by_file([SimpleNamespace(storage_index=0)], stored, uri.removesuffix("/o"))
    return constructor


CASES: dict[str, tuple[Callable[[str], Any], Callable[[Any, str], bytes]]] = {
    "RangeFetcher": (lambda _: RangeFetcher(pool_config=POOL), read_by_fetcher),
    "AsyncRangeFetcher": (lambda _: AsyncRangeFetcher(pool_config=POOL), read_by_async_fetcher),
    "fsspec": (lambda _: fsspec.filesystem("mpreader", pool_config=POOL), read_by_file_system),
    "S3Client": (lambda _: S3Client(), read_by_client),
    "multiprocess": (
        lambda uri: with_ranges(S3ReaderConstructor.multiprocess(pool_config=POOL), uri),
        read_by_constructor,
    ),
    "sequential": (lambda _: S3ReaderConstructor.sequential(), read_by_constructor),
    "range_based": (lambda _: S3ReaderConstructor.range_based(), read_by_constructor),
    "dcp_optimized": (lambda uri: with_ranges(S3ReaderConstructor.dcp_optimized(), uri), read_by_constructor),
}


@pytest.mark.parametrize("is_used", [False, True], ids=["unused", "used"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.row("secrets")
def test_copy_reads_and_no_secret_was_pickled(uri: str, name: str, is_used: bool) -> None:
    make, read = CASES[name]
    thing = make(uri)
    if is_used and not name.endswith("Fetcher"):  # reading closes these
        assert read(thing, uri) == DATA[7:1000]
    elif is_used:
        thing._engine.pool.start()
    pickled = pickle.dumps(thing)
    for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        value = os.environ.get(secret, "")
        assert not value or value.encode() not in pickled
    for other in (pickle.loads(pickled), copy.deepcopy(thing)):
        assert type(other) is type(thing)
        assert read(other, uri) == DATA[7:1000]
    if name.endswith("Fetcher"):
        assert thing._engine.pool.is_running is is_used, "the copies have pools of their own"
        assert read(thing, uri) == DATA[7:1000]
    elif hasattr(thing, "close"):
        thing.close()


@pytest.mark.parametrize("name", ["RangeFetcher", "AsyncRangeFetcher"])
def test_copy_of_a_closed_fetcher_is_closed(uri: str, name: str) -> None:
    make, read = CASES[name]
    fetcher = make(uri)
    fetcher._engine.close()
    with pytest.raises(PoolClosed):
        read(pickle.loads(pickle.dumps(fetcher)), uri)


def test_settings_travel_with_a_fetcher() -> None:
    class Named(RangeFetcher):
        label = "plain"

    fetcher = RangeFetcher(S3ClientConfig(region="eu-west-1", unsigned=True), PoolConfig(workers=3), progress=True)
    other = pickle.loads(pickle.dumps(fetcher))
    assert other._engine._configs == fetcher._engine._configs
    assert other._engine._progress is True
    assert other._engine.pool.sizes.workers == 3
    named = Named()
    named.label = "mine"  # also what a class of the program adds
    assert copy.copy(named).label == "mine"


def test_checkpoint_reader_and_writer_work_as_copies(bucket: str) -> None:
    uri = f"s3://{bucket}/checkpoint"
    save(
        {"w": torch.arange(1000)},
        storage_writer=pickle.loads(pickle.dumps(S3StorageWriter("us-east-1", uri))),
        no_dist=True,
    )
    with S3StorageReader("us-east-1", uri, pool_config=POOL) as reader:
        for each in (pickle.loads(pickle.dumps(reader)), reader, pickle.loads(pickle.dumps(reader))):
            state = {"w": torch.zeros(1000, dtype=torch.int64)}
            load(state, storage_reader=each, no_dist=True)
            assert torch.equal(state["w"], torch.arange(1000))
            each.close()
    assert pickle.loads(pickle.dumps(S3FileSystem("us-east-1"))).exists(f"{uri}/.metadata")


DATASET = """
import pickle, sys
import fsspec, torch
from mpreader import PoolConfig, RangeFetcher
from mpreader.dcp import S3StorageReader

class Dataset(torch.utils.data.Dataset):
    def __init__(self, uri):
        pool_config = PoolConfig(workers=1, max_memory=8 << 20)
        self.uri = uri
        self.fetcher = RangeFetcher(pool_config=pool_config)
        self.filesystem = fsspec.filesystem("mpreader", pool_config=pool_config)
        self.fetcher.fetch(uri, [(0, 1)])  # the pool runs when the workers are started

    def __len__(self):
        return 4

    def __getitem__(self, index):
        piece = bytes(self.fetcher.fetch(self.uri, [(index * 100, index * 100 + 10)])[0])
        assert piece == self.filesystem.cat_file(self.uri, index * 100, index * 100 + 10)
        return piece.hex()

if __name__ == "__main__":
    dataset = Dataset(sys.argv[1])
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, batch_size=None, multiprocessing_context=sys.argv[2])
    print(*loader)
    dataset.fetcher.close()
"""


@pytest.mark.parametrize("start_method", ["spawn", "forkserver", "fork"])
@pytest.mark.row("fork of the program after use", within_s=60)
def test_dataset_with_a_fetcher_works_in_dataloader_workers(
    uri: str, tmp_path: Path, warm_interpreter: WarmInterpreter, start_method: str
) -> None:
    module = tmp_path / "dataset.py"
    module.write_text(DATASET)
    done = warm_interpreter.run(module, uri, start_method)
    expected = " ".join(DATA[index * 100 :][:10].hex() for index in range(4))
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
