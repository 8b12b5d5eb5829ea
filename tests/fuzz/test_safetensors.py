"""Damaged safetensors files: read as the safetensors library reads them, or refused; their indices lead nowhere else.

Nothing large is made, whatever numbers a file names.
"""

from __future__ import annotations

import copy
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from mpreader.errors import PlanError
from mpreader.fetch.safetensors import SUFFIX, FileFetcher, files_of
from mpreader.formats.safetensors import BITS, Header, HeaderRefused, decode_header, header_end

if TYPE_CHECKING:
    from tests.fuzz.conftest import Mutant, Mutants

fuzzed = settings(max_examples=int(os.environ.get("MPREADER_FUZZ_EXAMPLES", "200")))

# What a byte of a header may cost while it is read: an empty list is two bytes, and an object of Python.
MOST_BYTES_PER_BYTE = 200
STRICTER = ("twice", "is not described by an object of JSON", "has the type {")  # than the library
JSON_PIECES = st.text('{}[]",:0123456789-eE.\\uabcdF \n\0', max_size=3).map(str.encode)
ODD: tuple[Any, ...] = (
    *(-1, 0, 1, 7, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**70, 10**400, 1.0, -0.0, 1e308, True),
    *(None, "", "U8", "F4", "pt", "\0", "\U0001f600", "\ud800", [], [0], [[]], [1, 2, 3], {}, {"a": "b"}, {"U8": None}),
)


def file_of(header: object, nbytes: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def decoded(content: bytes) -> Header:
    end = header_end(content[:8], len(content))
    return decode_header(content[8:end], len(content))


def read_by_the_library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        found = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found}


def check(content: bytes) -> None:
    """Check that a file is read as the library reads it; only what is STRICTER may be refused where that reads it."""
    told = read_by_the_library(content)
    refused = ""
    tracemalloc.start()
    try:
        header = decoded(content)
    except HeaderRefused as error:
        refused = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100_000 + MOST_BYTES_PER_BYTE * len(content), peak
    if refused:
        assert told is None or any(reason in refused for reason in STRICTER), refused
    else:
        tensors = header.tensors.values()
        assert told == {each.name: (each.dtype, each.shape, content[each.start : each.end]) for each in tensors}


@pytest.fixture(scope="session")
def files() -> list[bytes]:
    """Real files, and one of each type as the library would write it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, dtype=torch.bfloat16))
    tensors = {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), "names \u00e4": torch.ones(3, dtype=torch.int8)}
    return [
        save(model.state_dict(), {"format": "pt"}),
        save(tensors),
        *(
            file_of({"a": {"dtype": name, "shape": [8], "data_offsets": [0, bits]}}, bits)
            for name, bits in BITS.items()
        ),
    ]


@pytest.fixture(scope="session")
def damaged(mutants: Mutants, files: list[bytes]) -> st.SearchStrategy[Mutant]:
    return mutants(files)


@pytest.fixture(scope="session")
def damaged_indices(mutants: Mutants) -> st.SearchStrategy[Mutant]:
    index = {"metadata": {"total_size": 8}, "weight_map": {"a.b": "model-1.safetensors", "a.c": "below/2.safetensors"}}
    return mutants([json.dumps(index).encode(), b'{"weight_map":[["a","1.safetensors"]]}'])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and object within a value, with each of its indices or names, and a new name."""
    keys: list[Any] = [*value, "new"] if isinstance(value, dict) else [*range(len(value))]
    for key in keys:
        yield value, key
        inner = value[key] if key != "new" else None
        if isinstance(inner, (dict, list)):
            yield from places(inner)


@st.composite
def odd_files(draw: st.DrawFn) -> bytes:
    """Files whose headers are JSON, with up to two values that are others than they should be."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for number, count in enumerate(draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))):
        dtype = draw(st.sampled_from(["U8", "F32", "F4", "F6_E2M3"]))
        nbytes = 8 * count * BITS[dtype] // 8
        header[f"tensor {number}"] = {"dtype": dtype, "shape": [count, 8], "data_offsets": [end, end + nbytes]}
        end += nbytes
    for _ in range(draw(st.integers(0, 2))):
        owner, key = draw(st.sampled_from([*places(header)]))
        owner[key] = copy.deepcopy(draw(st.sampled_from(ODD) | st.integers(0, end + 1)))
    return file_of(header, max(0, end + draw(st.sampled_from([0, 0, 0, -1, 1]))))


class Served:
    """A directory that has nothing but an index."""

    def __init__(self, index: bytes) -> None:
        self._index = index

    def fetch_object(self, uri: str) -> bytes:
        return self._index

    def start(self) -> None:
        """Start nothing."""

    def client(self) -> Served:
        return self

    def get_object(self, bucket: str, key: str) -> io.BytesIO:
        return io.BytesIO(self._index)


def files_in(directory: str, index: object) -> list[str] | None:
    """URIs of the files that an index names; None where it was refused."""
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    try:
        return files_of(cast("FileFetcher", Served(content)), directory)
    except PlanError:
        return None


@fuzzed
@given(data=st.data())
def test_file_that_is_damaged_is_read_as_the_library_reads_it(
    data: st.DataObject, damaged: st.SearchStrategy[Mutant]
) -> None:
    check(data.draw(damaged).data)


@fuzzed
@given(content=odd_files(), at=st.integers(0, 2**10), length=st.integers(0, 3), piece=st.none() | JSON_PIECES)
def test_header_of_odd_values_is_read_as_the_library_reads_it(
    content: bytes, at: int, length: int, piece: bytes | None
) -> None:
    if piece is not None:
        end = header_end(content[:8], len(content))
        text = bytearray(content[8:end])
        text[at : at + length] = piece
        content = len(text).to_bytes(8, "little") + text + content[end:]
    check(content)


@fuzzed
@given(content=st.binary(max_size=200), nbytes=st.integers(0, 200) | st.integers(0, 2**64 - 1))
@example(content=b"{}", nbytes=2**63)
@example(content=b"[" * 100_000, nbytes=100_000)
def test_file_of_anything_is_read_or_refused(content: bytes, nbytes: int) -> None:
    check(content)
    check(nbytes.to_bytes(8, "little") + content)


@fuzzed
@given(data=st.data())
def test_index_that_is_damaged_names_files_of_its_directory_or_is_refused(
    data: st.DataObject, damaged_indices: st.SearchStrategy[Mutant]
) -> None:
    for uri in files_in("/folder", data.draw(damaged_indices).data) or ():
        assert os.path.normpath(uri).startswith("/folder/")
        assert uri.endswith(SUFFIX)
        assert "\0" not in uri


@fuzzed
@given(name=st.text().map(lambda text: text + SUFFIX) | st.text("./%2ef?#\\:é\0 ").map(lambda text: text + SUFFIX))
@example(name="%2e%2e/a.safetensors")
@example(name="https://other.example/a.safetensors?.safetensors")
def test_name_in_an_index_is_that_of_a_file_whatever_its_letters(name: str) -> None:
    found = [files_in(directory, {"weight_map": {"a": name}}) for directory in ("s3://bucket/d", "http://host/d?b=c")]
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        assert found == [None, None]
        return
    ([uri], [url]) = cast("list[list[str]]", found)
    assert uri == f"s3://bucket/d/{name}"
    parts = urlsplit(url)
    assert (parts.netloc, unquote(parts.path), parts.query, parts.fragment) == ("host", f"/d/{name}", "b=c", "")


DAMAGED: dict[str, object] = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "digits": b"9" * 10_000,
    "deep": b"[" * 100_000,
    "no map": {},
    "map of null": {"weight_map": None},
    "map of pairs": {"weight_map": [["a", f"a{SUFFIX}"]]},
    "name of null": {"weight_map": {"a": None}},
    "no name": {"weight_map": {"a": ""}},
    "other file": {"weight_map": {"a": "a.bin"}},
    "absolute": {"weight_map": {"a": f"/a{SUFFIX}"}},
    "above": {"weight_map": {"a": f"../a{SUFFIX}"}},
    "below and above": {"weight_map": {"a": f"b/../../a{SUFFIX}"}},
    "NUL": {"weight_map": {"a": f"\0{SUFFIX}"}},
    "half a character": {"weight_map": {"a": f"\ud800{SUFFIX}"}},
}


@pytest.mark.row("damaged or hostile safetensors header or index")
@pytest.mark.parametrize("index", DAMAGED.values(), ids=DAMAGED)
def test_index_that_is_none_is_refused(index: object) -> None:
    assert files_in("/folder", index) is None
