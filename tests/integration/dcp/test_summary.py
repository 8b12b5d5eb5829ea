from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mpreader import PoolConfig
from mpreader.dcp import MetadataRefused, S3FileSystem, describe_checkpoint, load_checkpoint
from mpreader.dcp.state import empty_state, nest
from mpreader.dcp.summary import FileSummary, ItemSummary, PlannedRequest, TensorSummary
from mpreader.errors import ConfigError, ObjectMissing, PlanError
from mpreader.testing import S3Server

KiB = 1024


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> TensorStorageMetadata:
    """A tensor stored in pieces of ``rows`` rows."""
    chunks = [
        ChunkStorageMetadata(torch.Size([at, *[0] * (len(shape) - 1)]), torch.Size([rows, *shape[1:]]))
        for at in range(0, shape[0], rows)
    ]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)


def metadata_of(planner_data: Any = None, **entries: Any) -> Metadata:
    return Metadata(entries, planner_data, {}, None)


def sharded() -> Metadata:
    """A tensor in two files, one behind a gap of 50 KiB, and one item."""
    metadata = metadata_of(
        sharded=tensor_of((4, 8), torch.bfloat16, 2),
        other=tensor_of((128,), torch.int64, 128),
        step=BytesStorageMetadata(),
    )
    metadata.storage_data = {
        MetadataIndex("sharded", torch.Size([0, 0]), 0): _StorageInfo("a.distcp", 100, 40 * KiB),
        MetadataIndex("sharded", torch.Size([2, 0]), 1): _StorageInfo("b.distcp", 0, 40 * KiB),
        MetadataIndex("other", torch.Size([0]), 0): _StorageInfo("a.distcp", 100 + 90 * KiB, 10 * KiB),
        MetadataIndex("step"): _StorageInfo("a.distcp", 0, 100),
    }
    return metadata


Write = Callable[[Any], str]


@pytest.fixture
def write(bucket: str) -> Write:
    """Makes a checkpoint that is nothing but its ``.metadata``."""

    def write(metadata: Any) -> str:
        uri = f"s3://{bucket}/described"
        files = S3FileSystem()
        with files.create_stream(f"{uri}/.metadata", "wb") as stream:
            stream.write(pickle.dumps(metadata))
        files.close()
        return uri

    return write


def test_summary_tells_what_is_where(write: Write) -> None:
    summary = describe_checkpoint(write(sharded()))
    assert summary.files == (FileSummary("a.distcp", 3, 50 * KiB + 100), FileSummary("b.distcp", 1, 40 * KiB))
    assert summary.tensors == (
        TensorSummary("sharded", "bfloat16", (4, 8), 64, 80 * KiB, 2, ("a.distcp", "b.distcp"), True),
        TensorSummary("other", "int64", (128,), 1024, 10 * KiB, 1, ("a.distcp",), True),
    )
    assert summary.items == (ItemSummary("step", 100, "a.distcp", True),)
    assert (summary.nbytes, summary.stored_nbytes) == (64 + 1024, 90 * KiB + 100)


def test_summary_plans_with_the_given_settings(write: Write) -> None:
    uri = write(sharded())
    load = describe_checkpoint(uri, pool_config=PoolConfig(part_size=64 * KiB)).load
    assert (load.tensors, load.items, load.nbytes, load.part_size) == (2, 1, 64 + 1024, 64 * KiB)
    # All of a.distcp is one group; the cut of its two requests falls into the gap.
    assert (load.groups, load.requests, load.head_requests, load.over_read_nbytes) == (2, 3, 2, 0)
    end = 100 + 40 * KiB
    assert load.files[0].parts == (PlannedRequest(0, end), PlannedRequest(100 + 90 * KiB, 100 + 100 * KiB))

    load = describe_checkpoint(uri, pool_config=PoolConfig(part_size=1024 * KiB)).load
    assert load.files[0].parts == (PlannedRequest(0, 100 + 100 * KiB, over_read=50 * KiB),)
    assert load.over_read_nbytes == load.fetched_nbytes - load.wanted_nbytes == 50 * KiB

    load = describe_checkpoint(uri, pool_config=PoolConfig(part_size=1024 * KiB), max_gap_size=50 * KiB - 1).load
    assert (load.files[0].groups, load.requests, load.over_read_nbytes) == (2, 3, 0)


def test_summary_plans_for_what_matches_and_tells_of_all(write: Write) -> None:
    uri = write(sharded())
    summary = describe_checkpoint(uri, match=["oth*", "nothing"])
    assert [(tensor.fqn, tensor.is_selected) for tensor in summary.tensors] == [("sharded", False), ("other", True)]
    assert [file.path for file in summary.load.files] == ["a.distcp"]
    assert (summary.load.wanted_nbytes, summary.load.head_requests) == (10 * KiB, 1)
    assert summary.load.match == ("oth*", "nothing")
    with pytest.raises(PlanError, match=r"nothing in the checkpoint matches 'x\*' or 'y'; it holds 3 items"):
        describe_checkpoint(uri, match=["x*", "y"])


def test_summary_becomes_json(write: Write) -> None:
    summary = describe_checkpoint(write(sharded()))
    document = json.loads(json.dumps(asdict(summary)))
    assert document["tensors"][0]["shape"] == [4, 8]
    assert document["load"]["files"][1]["parts"] == [{"start": 0, "end": 40 * KiB, "over_read": 0}]


def test_summary_asks_for_nothing_but_metadata(write: Write, s3_server: S3Server) -> None:
    uri = write(sharded())
    before = len(s3_server.requests)
    summary = describe_checkpoint(uri)
    asked = [(request.method, request.path) for request in s3_server.requests[before:]]
    assert asked == [("GET", f"{uri.removeprefix('s3:/')}/.metadata")] * summary.load.metadata_requests


def test_summary_of_an_empty_checkpoint(write: Write) -> None:
    summary = describe_checkpoint(write(metadata_of()))
    assert (summary.files, summary.tensors, summary.items, summary.load.requests) == ((), (), (), 0)


def test_summary_of_no_checkpoint(bucket: str) -> None:
    with pytest.raises(ObjectMissing, match=r"missing/\.metadata"):
        describe_checkpoint(f"s3://{bucket}/missing")


def test_summary_refuses_wrong_settings() -> None:
    with pytest.raises(TypeError, match="pool_config must be a PoolConfig or None, got int"):
        describe_checkpoint("s3://bucket/checkpoint", pool_config=8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_gap_size must be non-negative"):
        describe_checkpoint("s3://bucket/checkpoint", max_gap_size=-1)
    with pytest.raises(ConfigError, match="allowed_globals is a collection"):
        describe_checkpoint("s3://bucket/checkpoint", allowed_globals="a.B")


def _nowhere() -> Metadata:
    return Metadata({"w": tensor_of((4,), torch.int8, 4)}, None, None, None)


def _not_stored() -> Metadata:
    return metadata_of(w=tensor_of((4,), torch.int8, 4))


def _no_entry() -> Metadata:
    return metadata_of(w=torch.Size([1]))


def _no_dtype() -> Metadata:
    entry = tensor_of((4,), torch.int8, 4)
    entry.properties = "int8"  # type: ignore[assignment]
    return metadata_of(w=entry)


def _endless() -> Metadata:
    return metadata_of(w=TensorStorageMetadata(TensorProperties(torch.int64), torch.Size([1 << 40, 1 << 40]), []))


@pytest.mark.row("hostile .metadata")
@pytest.mark.parametrize("forged", [_nowhere, _not_stored, _no_entry, _no_dtype, _endless])
def test_metadata_that_describes_nothing_loadable_is_refused(write: Write, forged: Callable[[], Metadata]) -> None:
    uri = write(forged())
    for use in (describe_checkpoint, load_checkpoint):
        with pytest.raises(MetadataRefused, match="not so that they could be loaded"):
            use(uri)


def test_summary_of_items_that_have_no_name_is_refused(write: Write) -> None:
    metadata = sharded()
    metadata.storage_data["no MetadataIndex"] = _StorageInfo("a.distcp", 0, 1)
    with pytest.raises(MetadataRefused, match="not so that they could be loaded"):
        describe_checkpoint(write(metadata))


@pytest.mark.row("hostile .metadata")
def test_load_refuses_more_than_the_host_can_hold_before_it_asks_for_it(write: Write, s3_server: S3Server) -> None:
    metadata = metadata_of(w=tensor_of((1 << 50,), torch.int8, 1 << 50))
    metadata.storage_data = {MetadataIndex("w", torch.Size([0]), 0): _StorageInfo("a.distcp", 0, 100)}
    uri = write(metadata)
    assert describe_checkpoint(uri).nbytes == 1 << 50
    before = len(s3_server.requests)
    with pytest.raises(PlanError, match=rf"its tensors take {1 << 50} bytes, .* but only \d+ bytes of memory are free"):
        load_checkpoint(uri)
    assert [request.path.rpartition("/")[2] for request in s3_server.requests[before:]] == [".metadata"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (None, ["a.0", "a.1", "b"]),
        ("a.*", ["a.0", "a.1"]),
        (("b", "?.1"), ["a.1", "b"]),
        ("[!a]", ["b"]),
    ],
)
def test_patterns_select_names(pattern: Any, names: list[str]) -> None:
    entry = BytesStorageMetadata()
    assert list(empty_state(metadata_of(**{"a.0": entry, "a.1": entry, "b": entry}), pattern)) == names


def test_state_is_nested_as_it_was_saved() -> None:
    paths = {"a.0.x": ("a", 0, "x"), "a.1": ("a", 1), "b.0": ("b", "0")}
    nested = nest({"a.0.x": 1, "a.1": 2, "b.0": 3, "c.d": 4}, metadata_of(paths))
    assert nested == {"a": [{"x": 1}, 2], "b": {"0": 3}, "c.d": 4}
    assert nest({"a.1": 2}, metadata_of(paths)) == {"a": [None, 2]}


@pytest.mark.row("hostile .metadata")
@pytest.mark.parametrize(
    "path", [(), ("a", -1), ("a", 1 << 40), "a", ("a", 1.5), ("other", "b"), (0, 1), ("a", True), 7]
)
def test_forged_paths_are_refused(path: Any) -> None:
    with pytest.raises(MetadataRefused, match="not so that they could be loaded"):
        nest({"other": torch.zeros(2), "w": 1}, metadata_of({"w": path, "other": ("other",)}))
