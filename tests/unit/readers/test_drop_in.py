"""The constructors inside s3torchconnector's own storage reader, over a folder in place of a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader import S3ReaderConstructor

pytest.importorskip("tenacity", reason="s3torchconnector.dcp needs it: install s3torchconnector[dcp]")

from s3torchconnector.dcp.s3_file_system import S3FileSystem, S3StorageReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class FolderClient:
    """Client for s3torchconnector's S3FileSystem: the last segments of the keys are files of a folder.

    Attributes:
        requests: (start, end) of each stream of a file other than ``.metadata``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[int | None, int | None]] = []

    def get_object(self, bucket: str, key: str, reader_constructor: Any) -> Any:
        body = (self.folder / Path(key).name).read_bytes()

        def stream(start: int | None = None, end: int | None = None) -> Iterator[bytes]:
            if not key.endswith(".metadata"):
                self.requests.append((start, end))
            part = body[start:end]
            return (part[i : i + 1000] for i in range(0, len(part), 1000))

        return reader_constructor(
            bucket=bucket, key=key, get_object_info=lambda: SimpleNamespace(size=len(body)), get_stream=stream
        )


def storage_reader(folder: Path, path: str, constructor: Any) -> tuple[Any, FolderClient]:
    client: Any = FolderClient(folder)
    reader: Any = S3StorageReader("us-east-1", path, reader_constructor=constructor)
    reader.fs = S3FileSystem("us-east-1", s3_client=client, reader_constructor=constructor)
    return reader, client


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, Any]:
    saved = {"weights": {str(n): torch.rand(n, 3) for n in (0, 1, 500, 20)}, "step": 7, "text": "bytes item"}
    save(saved, storage_writer=FileSystemWriter(tmp_path, thread_count=2), no_dist=True)
    return saved


@pytest.mark.parametrize("kind", ["sequential", "range_based", "default", "dcp_optimized"])
def test_constructor_serves_several_loads(tmp_path: Path, checkpoint: dict[str, Any], kind: str) -> None:
    constructor = getattr(S3ReaderConstructor, kind)()
    for path in ("s3://bucket", "s3://bucket/", "s3://bucket/a/b", "s3://bucket/a/b/", "s3://bucket/a//"):
        weights = {name: torch.full_like(value, torch.nan) for name, value in checkpoint["weights"].items()}
        loaded = {"weights": weights, "step": 0, "text": ""}
        load(loaded, storage_reader=storage_reader(tmp_path, path, constructor)[0], no_dist=True)
        assert (loaded["step"], loaded["text"]) == (7, "bytes item")
        assert all(torch.equal(weights[name], value) for name, value in checkpoint["weights"].items())


def test_dcp_optimized_load_of_one_tensor_requests_only_its_bytes(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    reader, client = storage_reader(tmp_path, "s3://bucket/a", S3ReaderConstructor.dcp_optimized())
    loaded = {"weights": {"500": torch.zeros(500, 3)}}
    load(loaded, storage_reader=reader, no_dist=True)
    assert torch.equal(loaded["weights"]["500"], checkpoint["weights"]["500"])
    [place] = [info for index, info in reader.storage_data.items() if index.fqn == "weights.500"]
    assert client.requests == [(place.offset, place.offset + place.length)]
