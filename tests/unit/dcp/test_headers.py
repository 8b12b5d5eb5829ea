"""Headers of safetensors files that contradict each other, or say what can't be."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mpreader.dcp.headers import metadata_of
from mpreader.dcp.planned import RawItem
from mpreader.formats import torch_tensors
from mpreader.formats.safetensors import Header, HeaderRefused, StoredTensor


def header_of(shape: tuple[int, ...], offsets: object = None, dtype: str = "F32", name: str = "w") -> Header:
    """Returns the header of a file of one tensor, whose piece begins at ``offsets``; None: the file has no pieces."""
    nbytes = torch.Size(shape).numel() * (4 if dtype == "F32" else 2)
    metadata = {} if offsets is None else {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": offsets}})}
    return Header({name: StoredTensor(name, dtype, shape, 100, 100 + nbytes)}, metadata)


def test_pieces_of_a_tensor_become_its_chunks() -> None:
    scalars = header_of((), dtype="BF16", name="s")
    metadata = metadata_of({"a": header_of((2, 3), [0, 0]), "b": header_of((4, 3), [2, 0]), "c": scalars})
    entry, scalar = metadata.state_dict_metadata["w"], metadata.state_dict_metadata["s"]
    assert isinstance(entry, TensorStorageMetadata)
    assert isinstance(scalar, TensorStorageMetadata)
    assert (entry.size, entry.properties.dtype) == ((6, 3), torch.float32)
    assert [(chunk.offsets, chunk.sizes) for chunk in entry.chunks] == [((0, 0), (2, 3)), ((2, 0), (4, 3))]
    assert (scalar.size, scalar.properties.dtype) == ((), torch.bfloat16)
    assert metadata.storage_data is not None
    stored = metadata.storage_data[MetadataIndex("w", torch.Size((2, 0)))]
    assert isinstance(stored, RawItem)
    assert stored[:3] == ("b", 100, 48)
    assert (stored.layout.size, stored.layout.payload_offset) == ((4, 3), 0)


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (header_of((2, 3)), "'w' is in a and in b: the same piece of it"),
        (header_of((2, 3), [2, 0], "BF16"), "in a and in b: of another type"),
        (header_of((2,), [2]), "in a and in b: of another .* number of dimensions"),
        (header_of((2, 3), [3, 0]), r"have 12 elements, but a tensor of shape \[5, 3\] has 15: a file is missing"),
        (header_of((2, 3), [-1, 0]), r"of shape \[2, 3\] begins at \[-1, 0\]"),
        (header_of((2, 3), [2]), r"begins at \[2\]"),
        (header_of((2, 3), [True, 0]), r"begins at \[True, 0\]"),
        (header_of((2, 3), [0.0, 1]), r"begins at \[0.0, 1\]"),
        (header_of((2, 3), "00"), "begins at '00'"),
        (header_of((2, 3))._replace(metadata={"DCP_SHARDING_INFO": "{}"}), "begins at None"),
        (header_of((2, 3))._replace(metadata={"DCP_SHARDING_INFO": "{"}), "b: its DCP_SHARDING_INFO is damaged"),
        (header_of((2, 3))._replace(metadata={"DCP_SHARDING_INFO": '{"w": 1}'}), "b: its DCP_SHARDING_INFO is damaged"),
        (header_of((2, 3))._replace(metadata={"DCP_SHARDING_INFO": "[" * 99999}), "its DCP_SHARDING_INFO is damaged"),
    ],
)
def test_headers_that_do_not_make_a_whole_are_refused(second: Header, reason: str) -> None:
    with pytest.raises(HeaderRefused, match=reason):
        metadata_of({"a": header_of((2, 3), [0, 0]), "b": second})


def test_tensor_of_a_type_that_torch_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch_tensors, "TORCH_DTYPES", {"F32": torch.float32})
    metadata = metadata_of({"a": header_of((2,)), "b": header_of((2,), dtype="BF16", name="new")})
    assert list(metadata.state_dict_metadata) == ["w"]
    assert "b: left out: tensor 'new' has the type BF16" in caplog.text
