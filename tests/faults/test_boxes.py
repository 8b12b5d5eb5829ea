"""Loads of a box of a stored tensor whose record, object or metadata is not what the plan was made from."""

from __future__ import annotations

import dataclasses
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import ChecksumMismatch, ObjectChanged, PlanError, PoolConfig, S3ClientConfig
from mpreader.config import KiB, MiB
from mpreader.dcp import S3StorageReader
from mpreader.pool.stats import PoolStats
from mpreader.testing import Fault, FaultKind, FaultServer

if TYPE_CHECKING:
    from tests.faults.conftest import Serve

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.usefixtures("_no_delays"),
]

FILE, METADATA = "/bucket/run/__0_0.distcp", "/bucket/run/.metadata"
ROWS = slice(800, 900)
WEIGHT = torch.arange(1_000_000, dtype=torch.int32).reshape(1000, 1000)
IN_BOX = 3_400_000  # a byte of the box


class BoxPlanner(DefaultLoadPlanner):
    """Reads one box of the only tensor of a checkpoint."""

    def __init__(self, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        super().__init__()
        self.target = torch.zeros(list(lengths), dtype=torch.int32)
        self._offsets = torch.Size(offsets)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        [index] = self.metadata.storage_data
        origin = torch.Size([0] * len(self._offsets))
        item = ReadItem(LoadItemType.TENSOR, index, origin, index, self._offsets, self.target.size())
        return LoadPlan([item])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor.data_ptr() == self.target.data_ptr()


SaveAndServe = Callable[[torch.Tensor], FaultServer]


@pytest.fixture
def served(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SaveAndServe:
    """Save a tensor, and start a server of the checkpoint."""

    def start(tensor: torch.Tensor) -> FaultServer:
        save({"weight": tensor}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
        server = serve({f"/bucket/run/{file.name}": file.read_bytes() for file in tmp_path.iterdir()})
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return server

    return start


def load_box(
    server: FaultServer,
    offsets: Sequence[int] = (ROWS.start, 0),
    lengths: Sequence[int] = (ROWS.stop - ROWS.start, 1000),
    **options: Any,
) -> tuple[torch.Tensor, PoolStats]:
    planner = BoxPlanner(offsets, lengths)
    client = S3ClientConfig("us-east-1", endpoint_url=server.endpoint_url, force_path_style=True, max_attempts=2)
    config = PoolConfig(1, max_memory=8 * MiB, part_size=256 * KiB)
    with S3StorageReader("us-east-1", "s3://bucket/run", client, pool_config=config, **options) as reader:
        load({}, storage_reader=reader, planner=planner, no_dist=True)
        return planner.target, reader.stats


def error_of(server: FaultServer, *box: Sequence[int], **options: Any) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        load_box(server, *box, **options)
    [(error, _)] = caught.value.failures.values()
    return error


def requests(server: FaultServer, method: str = "GET") -> list[Any]:
    return [request for request in server.requests if request.path == FILE and request.method == method]


def in_front(folder: Path) -> int:
    """A byte of the front: with a flipped bit it says that the tensor has 744 rows in place of 1000."""
    return (folder / "__0_0.distcp").read_bytes().index(pickle.BININT2 + (1000).to_bytes(2, "little")) + 2


def rewrite_metadata(server: FaultServer, content: bytes, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads(content)
    change(metadata)
    server.put(METADATA, pickle.dumps(metadata))


def put_record(server: FaultServer, folder: Path, record: bytes) -> None:
    """Replace the only record of a checkpoint."""

    def change(metadata: Any) -> None:
        [(index, stored)] = metadata.storage_data.items()
        metadata.storage_data[index] = dataclasses.replace(stored, length=len(record))

    rewrite_metadata(server, (folder / ".metadata").read_bytes(), change)
    server.put(FILE, record)


def with_short_tail(record: bytes) -> bytes:
    """A record with all that is needed, but less behind the payload than torch writes."""

    class Stream(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation  # so that the sizes stand behind the entries, as in torch's

    stream = Stream()
    names = ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0")
    with zipfile.ZipFile(io.BytesIO(record)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in names:
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.extra = b"FB\x04\0ZZZZ"  # padding, as torch writes it before each content
            new.writestr(entry, old.read(f"archive/{name}"))
    return stream.getvalue()


PREDICTED = "a box of a tensor: its record is not laid out as predicted"
DAMAGED = "a box of a tensor: the front of its record is damaged"
OVERWRITTEN = "a box of a tensor: overwritten before what was not predicted is read"
FLIPPED = "a box of a tensor: a bit of it is flipped"
HOSTILE = "hostile .metadata"


@pytest.mark.row(PREDICTED)
def test_box_of_a_tensor_in_another_order_is_read_again(served: SaveAndServe) -> None:
    stored = WEIGHT.t()
    server = served(stored)
    target, stats = load_box(server)
    assert torch.equal(target, stored[ROWS])
    assert len(requests(server, "HEAD")) == 1
    assert stats.bytes > target.nbytes  # of the first wave nothing was of use


@pytest.mark.row(PREDICTED)
@pytest.mark.parametrize(
    "change",
    [with_short_tail, lambda record: record + bytes(5000), lambda record: record[:-300]],
    ids=["short tail", "long tail", "cut off"],
)
def test_box_whose_payload_begins_elsewhere_is_read_again(
    served: SaveAndServe, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    server = served(WEIGHT)
    put_record(server, tmp_path, change((tmp_path / "__0_0.distcp").read_bytes()))
    target, _ = load_box(server)
    assert torch.equal(target, WEIGHT[ROWS])
    assert len(requests(server, "HEAD")) == 1


@pytest.mark.row(DAMAGED)
def test_front_that_is_damaged_once_is_read_again_with_the_whole_item(served: SaveAndServe, tmp_path: Path) -> None:
    server = served(WEIGHT)
    server.inject(Fault(FaultKind.FLIPPED_BIT, at=(1,), path=FILE, covering=in_front(tmp_path)))
    target, stats = load_box(server)
    assert torch.equal(target, WEIGHT[ROWS])
    assert stats.verified_bytes > WEIGHT.nbytes
    assert stats.unverified_bytes == 0
    assert sum(request.fault is not None for request in server.requests) == 1


@pytest.mark.row(DAMAGED)
@pytest.mark.parametrize("verify", [True, False])
def test_front_that_stays_damaged_names_the_tensor(served: SaveAndServe, tmp_path: Path, verify: bool) -> None:
    server = served(WEIGHT)
    server.inject(Fault(FaultKind.FLIPPED_BIT, path=FILE, covering=in_front(tmp_path)))
    error = error_of(server, verify=verify)
    assert type(error) is ChecksumMismatch
    assert re.search(r"'weight' is damaged in s3://bucket/run/__0_0\.distcp", str(error))


@pytest.mark.row(OVERWRITTEN)
def test_box_that_is_read_again_is_never_of_another_version(served: SaveAndServe, tmp_path: Path) -> None:
    server = served(WEIGHT.t())
    load_box(server)
    first = requests(server)[0].range
    again = next(request.range for request in requests(server) if not is_predicted(request.range))
    assert first != again
    server.stage(FILE, (tmp_path / "__0_0.distcp").read_bytes()[:-1] + b"\1")
    server.inject(Fault(FaultKind.OVERWRITTEN, at=(1,), path=FILE, covering=first_byte(again)))
    assert type(error_of(server)) is ObjectChanged
    assert len(requests(server, "HEAD")) == 2  # one for each load, none for what was read again


def first_byte(header: str) -> int:
    return int(header.removeprefix("bytes=").partition("-")[0])


def is_predicted(header: str) -> bool:
    """True of the ranges of the first wave: the front, and the rows as they would lie in a contiguous tensor."""
    start = first_byte(header)
    return start == 0 or 3_100_000 <= start < 3_700_000


@pytest.mark.row(FLIPPED)
def test_bit_that_is_flipped_in_a_box_is_counted_as_unverified(served: SaveAndServe) -> None:
    server = served(WEIGHT)
    server.inject(Fault(FaultKind.FLIPPED_BIT, path=FILE, covering=IN_BOX))
    target, stats = load_box(server)
    assert (target != WEIGHT[ROWS]).sum() == 1  # this is what can not be noticed, and what the numbers say
    assert (stats.verified_bytes, stats.unverified_bytes) == (0, target.nbytes)


@pytest.mark.row(FLIPPED)
def test_bit_that_is_flipped_in_a_box_is_found_where_items_are_read_whole(served: SaveAndServe) -> None:
    server = served(WEIGHT)
    server.inject(Fault(FaultKind.FLIPPED_BIT, path=FILE, covering=IN_BOX))
    assert type(error_of(server, verify="whole")) is ChecksumMismatch
    server.inject(Fault(FaultKind.FLIPPED_BIT, at=(1,), path=FILE, covering=IN_BOX))
    target, stats = load_box(server, verify="whole")
    assert torch.equal(target, WEIGHT[ROWS])
    assert stats.verified_bytes > WEIGHT.nbytes
    assert stats.unverified_bytes == 0


def forge(server: FaultServer, folder: Path, size: Sequence[int], nbytes: int | None = None) -> None:
    """Have ``.metadata`` say that the tensor has another shape, and its record another length."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["weight"]
        entry.size = torch.Size(size)
        entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(size))]
        [(index, stored)] = metadata.storage_data.items()
        metadata.storage_data[index] = dataclasses.replace(stored, length=nbytes or stored.length)

    rewrite_metadata(server, (folder / ".metadata").read_bytes(), change)


@pytest.mark.row(HOSTILE)
def test_shape_that_is_not_that_of_the_record_loads_nothing_else(served: SaveAndServe, tmp_path: Path) -> None:
    server = served(WEIGHT)
    forge(server, tmp_path, (2000, 500))
    target, _ = load_box(server, (100, 0), (100, 500))  # inside of the record's shape: what torch itself would load
    assert torch.equal(target, WEIGHT[100:200, :500])
    error = error_of(server, (1500, 0), (100, 500))
    assert type(error) is PlanError
    assert "outside of a tensor of [1000, 1000]" in str(error)
    for size in ((500, 500), (4000, 4000)):  # of other lengths than the record
        forge(server, tmp_path, size)
        assert torch.equal(load_box(server, (100, 0), (100, 500))[0], WEIGHT[100:200, :500])


@pytest.mark.row(HOSTILE, within_s=10)
@pytest.mark.parametrize("rows", [10_000, 10_001])  # as many runs as are requested at most, and one more
def test_forged_number_of_rows_that_are_far_apart_costs_few_requests(
    served: SaveAndServe, tmp_path: Path, rows: int
) -> None:
    server = served(WEIGHT)
    columns = MiB
    forge(server, tmp_path, (rows, columns), rows * columns * 4 + 1577)
    assert type(error_of(server, (0, 7), (rows, 1))) is PlanError
    ranges = [re.findall(r"\d+", request.range) for request in requests(server)]
    assert sum(int(end) + 1 - int(start) for start, end in ranges) < 2 * WEIGHT.nbytes
