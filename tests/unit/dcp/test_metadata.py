from __future__ import annotations

import dataclasses
import gc
import inspect
import io
import pickle
import sys
import tracemalloc
import weakref
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from mpreader.dcp.metadata import MetadataRefused, load_metadata

_with_transforms = pytest.mark.skipif(
    "transform_descriptors" not in {field.name for field in dataclasses.fields(_StorageInfo)},
    reason=f"torch {torch.__version__} stores nothing that is transformed",
)


class Foreign:
    """A class that no checkpoint needs."""


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.marker,)


def metadata_with(storage_data: Any = None, planner_data: Any = None, count: int = 1) -> Metadata:
    properties = TensorProperties(torch.bfloat16, memory_format=torch.channels_last)
    chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))]
    state: dict[str, Any] = {
        f"weight.{number}": TensorStorageMetadata(properties, torch.Size([2, 3]), chunks) for number in range(count)
    }
    state["step"] = BytesStorageMetadata()
    return Metadata(state, planner_data, storage_data, StorageMeta(PurePosixPath("/somewhere")))


def load(metadata: Any, protocol: int | None = None, **options: Any) -> Metadata:
    return load_metadata(io.BytesIO(pickle.dumps(metadata, protocol)), **options)


@_with_transforms
@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_is_what_pickle_gives(protocol: int) -> None:
    storage = {
        MetadataIndex("weight.0", [0, 0], 0): _StorageInfo("__0_0.distcp", 0, 10),
        MetadataIndex("step"): _StorageInfo("epoch_1/__0_0.distcp", 10, 0, ["stream.zstd/1"]),
    }
    metadata = metadata_with(storage, {"step": ("optim", 0, "step"), "seen": {1, 2}})
    assert load(metadata, protocol) == metadata


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_of_a_real_checkpoint_is_what_pickle_gives(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "list": [torch.ones(2), "a"]}
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    assert load_metadata(io.BytesIO(data)) == pickle.loads(data)


class Attribute:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner: object, name: str) -> None:
        self.reduced = getattr, (owner, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def test_metadata_of_python_3_11_0_to_3_names_enumerations_by_getattr() -> None:
    metadata = metadata_with(planner_data=Attribute(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"))
    loaded: Any = load_metadata(io.BytesIO(pickle.dumps(metadata)))
    assert loaded.planner_data is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST


def test_metadata_that_names_enumerations_by_getattr_is_let_go_of_with_its_last_reference() -> None:
    # The collector of Python 3.11.0 to 3.11.3 doesn't see what an unpickler holds: no circle may lead to it.
    pickled = pickle.dumps(metadata_with(planner_data=Attribute(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")))
    gc.disable()
    try:
        loaded = weakref.ref(load_metadata(io.BytesIO(pickled)))
        assert loaded() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("owner", "name"), [(torch.Size, "__class__"), (_MEM_FORMAT_ENCODING, "__class__")])
def test_metadata_reads_no_attribute(owner: object, name: str) -> None:
    with pytest.raises(MetadataRefused):
        load_metadata(io.BytesIO(pickle.dumps(metadata_with(planner_data=Attribute(owner, name)))))


def test_metadata_that_needs_another_class_is_refused_and_named() -> None:
    name = f"{Foreign.__module__}.Foreign"
    with pytest.raises(MetadataRefused, match="allowed_globals") as refused:
        load(metadata_with({}, Foreign()))
    assert name in str(refused.value)
    assert isinstance(load(metadata_with({}, Foreign()), allowed_globals=(name,)).planner_data, Foreign)


@pytest.mark.row("hostile .metadata")
def test_metadata_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(MetadataRefused, match=r"pathlib\.(_local\.)?Path\.mkdir"):  # _local: Python 3.13
        load(metadata_with({}, Evil(tmp_path / "marker")))
    with pytest.raises(MetadataRefused, match=r"builtins\.eval"):
        load_metadata(io.BytesIO(b"cbuiltins\neval\nX\x02\x00\x00\x00()\x85R."))
    with pytest.raises(MetadataRefused, match=r"torch\.load"):
        load_metadata(io.BytesIO(b"ctorch\nload\n."))
    with pytest.raises(MetadataRefused, match="outside of itself"):
        load_metadata(io.BytesIO(b"X\x02\x00\x00\x00()Q."))
    assert not (tmp_path / "marker").exists()


_BUILD_SLOTS = b"N}\x8c\x08pollutedK\x01s\x86b"  # BUILD of what is on the stack: setattr(it, "polluted", 1)


@pytest.mark.parametrize(
    "made",
    [
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cpathlib\nPosixPath\n",
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n",
        b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R",
        b"ctorch.serialization\n_get_layout\n",
        b"cbuiltins\ngetattr\n",
    ],
)
@pytest.mark.row("hostile .metadata")
def test_metadata_changes_nothing_that_is_not_its_own(made: bytes) -> None:
    shared: list[Any] = [
        Metadata,
        PosixPath,
        _MEM_FORMAT_ENCODING,
        *_MEM_FORMAT_ENCODING,
        torch.serialization._get_layout,
    ]
    before = [dict(vars(each)) for each in shared]
    with pytest.raises(MetadataRefused):
        load_metadata(io.BytesIO(b"\x80\x04" + made + _BUILD_SLOTS + b"."))
    assert [dict(vars(each)) for each in shared] == before


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_is_made_of_the_classes_themselves(protocol: int) -> None:
    metadata = load(metadata_with({MetadataIndex("w"): _StorageInfo("a", 0, 1)}), protocol)
    assert type(metadata) is Metadata
    assert {type(index) for index in metadata.storage_data} == {MetadataIndex}
    assert type(metadata.state_dict_metadata["weight.0"]) is TensorStorageMetadata


@pytest.mark.row("hostile .metadata")
def test_metadata_of_few_bytes_reserves_few() -> None:
    for hostile in (b"Nr\xff\xff\xff\x00.", b"\x96" + (2**31).to_bytes(8, "little") + b"."):
        tracemalloc.start()
        try:
            with pytest.raises(MetadataRefused, match="damaged"):
                load_metadata(io.BytesIO(b"\x80\x05" + hostile))
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_metadata_with_an_index_too_deep_to_be_named_is_refused() -> None:
    deep: tuple[Any, ...] = ()
    for _ in range(300):
        deep = (deep,)
    data = pickle.dumps(metadata_with({deep: _StorageInfo("../x", 0, 1)}))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        with pytest.raises(MetadataRefused):
            load_metadata(io.BytesIO(data))
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a/..", "./a", "a\0b", 3, b"x"])
@pytest.mark.row("hostile .metadata")
def test_metadata_that_names_a_file_outside_is_refused(path: Any) -> None:
    with pytest.raises(MetadataRefused, match="outside"):
        load(metadata_with({MetadataIndex("w"): _StorageInfo(path, 0, 1)}))


@pytest.mark.parametrize("numbers", [(-1, 1), (0, -1), (0, 1.0), (True, 1), ("0", 1)])
@pytest.mark.row("hostile .metadata")
def test_metadata_with_impossible_numbers_is_refused(numbers: tuple[Any, Any]) -> None:
    with pytest.raises(MetadataRefused, match="impossible"):
        load(metadata_with({MetadataIndex("w"): _StorageInfo("a", *numbers)}))


def test_metadata_that_places_an_item_nowhere_is_refused() -> None:
    # Newer torch does not pickle what is None, older does.
    with pytest.raises(MetadataRefused, match=r"where|impossible place: offset None"):
        load(metadata_with({MetadataIndex("w"): _StorageInfo("a", None, 1)}))  # type: ignore[arg-type]


@_with_transforms
@pytest.mark.parametrize("descriptors", ["stream.zstd/1", 3, [1]])
def test_metadata_with_invalid_transformations_is_refused(descriptors: Any) -> None:
    with pytest.raises(MetadataRefused, match="transformation"):
        load(metadata_with({MetadataIndex("w"): _StorageInfo("a", 0, 1, descriptors)}))


@pytest.mark.parametrize("value", [3, {"a": 1}, _StorageInfo("a", 0, 1)])
def test_metadata_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(MetadataRefused, match="not a Metadata"):
        load(value)
    with pytest.raises(MetadataRefused, match="stor"):
        load(metadata_with([value]))
    with pytest.raises(MetadataRefused, match="stor"):
        load(metadata_with({MetadataIndex("w"): BytesStorageMetadata()}))


SMALL = pickle.dumps(metadata_with({MetadataIndex("w"): _StorageInfo("a", 0, 1)}))


@given(cut=st.integers(0, len(SMALL) - 1))
def test_metadata_that_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(MetadataRefused, match="damaged"):
        load_metadata(io.BytesIO(SMALL[:cut]))


def test_metadata_of_100_000_entries_loads() -> None:
    storage = {
        MetadataIndex(f"weight.{n}", [0, 0], 0): _StorageInfo(f"__{n % 8}_0.distcp", n, 1) for n in range(100_000)
    }
    data = pickle.dumps(metadata_with(storage, count=100_000))
    assert load_metadata(io.BytesIO(data)).storage_data == storage
