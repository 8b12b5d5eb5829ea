from __future__ import annotations

import io
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpreader.dcp.tensor import copy_into, load_whole
from mpreader.formats.torch_save import (
    BufferItem,
    RecordCorrupted,
    _known_fronts,
    decode_layout,
    payload_place,
    read_payload_crc,
)


def record_of(value: object, **options: Any) -> bytearray:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return bytearray(stream.getvalue())


def _save_settings() -> Any:
    """The settings of torch.save; None: this torch has no alignment among them, as torch before 2.7."""
    try:
        from torch.utils.serialization import config
    except ModuleNotFoundError:
        return None
    return config.save if hasattr(config.save, "storage_alignment") else None


def padded_record(value: object, alignment: int = 4096) -> bytearray:
    save = _save_settings()
    if save is None:
        pytest.skip(f"torch {torch.__version__} saves no record with a large storage alignment")
    usual, save.storage_alignment = save.storage_alignment, alignment
    try:
        return record_of(value)
    finally:
        save.storage_alignment = usual


def load_like_reader(item: Any) -> torch.Tensor:
    layout = decode_layout(item)
    if layout is None:
        return load_whole(item)[0]
    tensor = torch.empty(layout.size, dtype=layout.dtype)
    copy_into(item, layout, tensor)
    return tensor


def try_load(item: Any) -> torch.Tensor | None:
    """The tensor, or None where it was refused with the right type of error."""
    try:
        return load_like_reader(item)
    except RecordCorrupted:
        return None
    except pickle.UnpicklingError:
        # Whatever is no archive any more is for torch.load to refuse.
        if bytes(item.view(0, min(4, item.size))) == b"PK\x03\x04":
            raise
        return None


def test_layout_names_place_and_checksum_of_the_payload() -> None:
    record = record_of(torch.arange(6, dtype=torch.int16).reshape(2, 3))
    layout = decode_layout(BufferItem(record))
    assert layout is not None
    assert (layout.dtype, layout.size, layout.stride, layout.storage_offset) == (torch.int16, (2, 3), (3, 1), 0)
    start = layout.payload_offset
    assert record[start : start + layout.payload_nbytes] == bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])
    assert read_payload_crc(BufferItem(record), layout) == zlib.crc32(record[start : start + layout.payload_nbytes])


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2).as_subclass(_Subclass),
        torch.empty(2, device="meta"),
        {"a": torch.ones(2)},
        [torch.ones(2), torch.ones(2)],
        "text",
    ],
    ids=["parameter", "grad", "conj", "sparse", "subclass", "meta", "dict", "list", "text"],
)
def test_layout_of_anything_but_a_plain_tensor_is_none(value: object) -> None:
    assert decode_layout(BufferItem(record_of(value))) is None


def test_layout_of_record_before_zip_is_none_and_torch_loads_it() -> None:
    item = BufferItem(record_of(torch.arange(5), _use_new_zipfile_serialization=False))
    assert decode_layout(item) is None
    assert torch.equal(load_whole(item)[0], torch.arange(5))


def test_layout_is_found_with_a_large_storage_alignment() -> None:
    record = padded_record(torch.arange(5))
    layout = decode_layout(BufferItem(record))
    assert layout is not None
    assert layout.payload_offset % 4096 == 0
    assert torch.equal(load_like_reader(BufferItem(record)), torch.arange(5))


@pytest.mark.parametrize("alignment", [64 << power for power in range(8)])
def test_place_of_a_payload_is_predicted_for_every_storage_alignment(alignment: int) -> None:
    for shape in ((1,), (100,), (3, 1000), (1, 1, 1, 5000, 1, 1), (63, 1001)):
        tensor = torch.zeros(shape, dtype=torch.uint8)
        record = padded_record(tensor, alignment)
        layout = decode_layout(BufferItem(record))
        place = payload_place(len(record), tensor.nbytes)
        assert layout is not None
        assert place is not None
        lowest, highest = place
        assert lowest <= layout.payload_offset <= highest
        assert highest - lowest <= 384 + alignment + 128  # no more than that is received in vain


def test_flipped_bit_in_a_front_never_moves_the_payload() -> None:
    record = record_of(torch.zeros(100, 1000))  # zeros would pass for extra fields without content
    right = decode_layout(BufferItem(record))
    assert right is not None
    for bit in range(8 * right.payload_offset):
        record[bit // 8] ^= 1 << bit % 8
        try:
            layout = decode_layout(BufferItem(record), 1024)
        except RecordCorrupted:
            layout = None
        assert layout in {None, right}
        record[bit // 8] ^= 1 << bit % 8


def test_layout_without_saved_checksums_has_none() -> None:
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip(f"torch {torch.__version__} saves no record without checksums")
    torch.serialization.set_crc32_options(False)
    try:
        record = record_of(torch.arange(5))
    finally:
        torch.serialization.set_crc32_options(True)
    layout = decode_layout(BufferItem(record))
    assert layout is not None
    assert read_payload_crc(BufferItem(record), layout) is None
    assert torch.equal(load_like_reader(BufferItem(record)), torch.arange(5))
    # A record that only torch.load understands is not refused for it either.
    assert torch.equal(load_whole(BufferItem(record))[0], torch.arange(5))


def test_layouts_of_records_with_long_fronts_are_not_kept() -> None:
    before = dict(_known_fronts)
    record = padded_record(torch.arange(7))
    assert decode_layout(BufferItem(record)) is not None
    assert _known_fronts == before, "a hostile checkpoint could fill the memory of the process with them"


def test_layout_of_a_known_head_still_notices_a_flip_in_it() -> None:
    record = record_of(torch.ones(17, 3))
    assert decode_layout(BufferItem(record)) is not None
    record[record.index(b"little")] ^= 1
    with pytest.raises(RecordCorrupted, match="byteorder"):
        decode_layout(BufferItem(record))


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_layout_of_a_hostile_pickle_executes_nothing(tmp_path: Path) -> None:
    item = BufferItem(record_of(_Evil(tmp_path / "marker")))
    assert decode_layout(item) is None
    with pytest.raises(Exception, match="Weights only load failed"):
        load_whole(item)
    assert not (tmp_path / "marker").exists()


def test_damaged_directory_of_a_record_is_a_corrupted_record() -> None:
    record = record_of(torch.arange(6).to_sparse())  # for torch.load
    directory_end = record.rindex(b"PK\x06\x06")
    record[directory_end + 16] ^= 1  # number of this disk, which zipfile does not mind
    assert decode_layout(BufferItem(record)) is None
    with pytest.raises(RecordCorrupted, match=r"torch\.load can't read it"):
        load_whole(BufferItem(record))


RECORDS = [
    (tensor, bytes(record_of(tensor)))
    for tensor in (torch.arange(40, dtype=torch.float32).reshape(5, 8), torch.empty(0, 3), torch.arange(9).bfloat16())
]


@given(
    which=st.sampled_from(RECORDS),
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(1, 255)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 2**16)),
    cuts=st.lists(st.integers(0, 2**16), max_size=4),
)
def test_mutated_record_gives_an_error_or_the_right_tensor(
    cut_item: Any,
    which: tuple[torch.Tensor, bytes],
    flips: list[tuple[int, int]],
    cut: int | None,
    cuts: list[int],
) -> None:
    tensor, original = which
    record = bytearray(original)
    for at, mask in flips:
        record[at % len(record)] ^= mask
    if cut is not None:
        del record[cut % len(record) :]
    loaded = try_load(cut_item(bytes(record), cuts))
    assert loaded is None or torch.equal(loaded, tensor)


@pytest.mark.parametrize("which", range(len(RECORDS)))
def test_every_flipped_bit_gives_an_error_or_the_right_tensor(which: int) -> None:
    tensor, original = RECORDS[which]
    loads = []
    for at in range(len(original)):
        record = bytearray(original)
        record[at] ^= 1 << (at % 8)
        loaded = try_load(BufferItem(record))
        assert loaded is None or torch.equal(loaded, tensor), at
        loads.append(loaded is not None)
    assert any(loads), "padding doesn't matter"
    assert not all(loads)


@given(data=st.binary(max_size=300))
def test_layout_of_arbitrary_bytes_is_none(cut_item: Any, data: bytes) -> None:
    assert decode_layout(cut_item(data)) is None
