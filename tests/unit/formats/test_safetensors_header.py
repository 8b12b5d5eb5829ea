"""Headers that are written; the safetensors library and the decoder are the judges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mpreader.errors import PlanError
from mpreader.formats.safetensors import BITS, LENGTH_BYTES, decode_header, packed_shape
from mpreader.formats.safetensors_header import TensorSpec, encode_header
from mpreader.formats.torch_tensors import TORCH_DTYPES

specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from([name for name in BITS if name in TORCH_DTYPES and not name.startswith("F6")]),
        st.lists(st.sampled_from([0, 1, 2, 6]), max_size=3).map(lambda sizes: (*sizes, 8)),
    ),
    unique_by=lambda spec: spec.name,
    max_size=8,
)


@given(specs, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text("äb\n"), max_size=1))
def test_header_has_the_bytes_of_the_library(tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
    header = encode_header(tensors, metadata)
    data = header.data[LENGTH_BYTES:]
    assert decode_header(data, header.file_nbytes) == ({each.name: each for each in header.tensors}, metadata)
    assert all(each.start % (BITS[each.dtype] / 8) == 0 for each in header.tensors)
    ours = {
        each.name: torch.zeros(each.end - each.start, dtype=torch.uint8).view(TORCH_DTYPES[each.dtype])
        .reshape(packed_shape(each))
        for each in header.tensors
    }  # fmt: skip
    assert save(ours, metadata or None)[: len(header.data)] == header.data


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "'a' is there twice"),
        (["__metadata__"], "can't be the name of a tensor"),
        (["\ud800"], "can't be written in UTF-8"),
        (["x" * 100_000_000], "longer|more than 100000000"),
    ],
)
def test_header_that_no_file_can_have_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        encode_header(TensorSpec(name, "U8", (1,)) for name in names)
