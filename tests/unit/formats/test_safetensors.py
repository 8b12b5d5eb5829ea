"""Headers of safetensors files; the safetensors library is the judge of what is right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from mpreader.formats.safetensors import BITS, MAX_HEADER_BYTES, Header, HeaderRefused, decode_header, header_end


def entry(dtype: str, shape: Any, start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: object, nbytes: int = 0) -> bytes:
    """Returns a file of a header, which may be its text, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


def decoded(content: bytes) -> Header:
    end = header_end(content[:8], len(content))
    return decode_header(content[8:end], len(content))


def is_read_by_the_library(content: bytes) -> bool:
    try:
        deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True


def nested(levels: int) -> list[Any]:
    return [nested(levels - 1)] if levels > 1 else []


ONE = entry("F32", [1], 0, 4)

WELL: dict[str, bytes] = {
    "no tensors": file_of({}),
    "space around": file_of(b" \n{}\t "),
    "metadata": file_of({"__metadata__": {"format": "pt", "a": "\u00e4"}}),
    "metadata is null": file_of({"__metadata__": None}),
    "other fields": file_of({"a": {**ONE, "more": [1.5, -1, True, 10**300], "text": "\u00e4"}}, 4),
    "other field of 127 levels": file_of({"a": {**ONE, "more": nested(125)}}, 4),
    "scalar": file_of({"a": entry("F32", [], 0, 4)}, 4),
    "in another order": file_of({"b": entry("F32", [1], 4, 8), "a": ONE}, 8),
    "without elements": file_of({"b": ONE, "a": entry("F32", [0, 5], 0, 0), "c": entry("I8", [0], 4, 4)}, 4),
    "half bytes": file_of({"a": entry("F4", [4], 0, 2)}, 2),
    "six bits": file_of({"a": entry("F6_E2M3", [4], 0, 3), "b": entry("F6_E3M2", [2, 2], 3, 6)}, 6),
    "name of an escape": file_of(b'{"\\u00e4":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    **{f"type {name}": file_of({"a": entry(name, [8], 0, bits)}, bits) for name, bits in BITS.items()},
}

BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "begins with 8 bytes, this one has 0"),
    "seven bytes": (bytes(7), "begins with 8 bytes, this one has 7"),
    "another format": (b"PK\3\4" + bytes(100) + b"\xff" * 4, "of another format"),
    "huge header": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "more than 100000000"),
    "cut header": ((100).to_bytes(8, "little") + b"{}", "cut off"),
    "no JSON": (file_of(b"{"), "no JSON"),
    "behind the JSON": (file_of(b"{}\0"), "no JSON"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "no JSON"),
    "half a character": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "no JSON"),
    "NaN": (file_of(b'{"__metadata__":{"a":NaN}}'), "no JSON"),
    "deep": (file_of(b"[" * 100_000), "no JSON"),
    "half a character in another field": (file_of({"a": {**ONE, "more": [{"b": ["\ud800"]}]}}, 4), "half of a char"),
    "other field of 128 levels": (file_of({"a": {**ONE, "more": nested(126)}}, 4), "more than 127 lists"),
    "too large a number in another field": (file_of({"a": {**ONE, "more": 10**400}}, 4), "too large"),
    "too large a fraction in another field": (file_of(b'{"a":{"more":-1e400}}'), "too large"),
    "list": (file_of([]), "a list, not an object"),
    "metadata of a number": (file_of({"__metadata__": {"a": 1}}), "must be texts"),
    "metadata of a number with a sign": (file_of({"__metadata__": {"a": -1}}), "must be texts"),
    "metadata of a fraction": (file_of({"__metadata__": {"a": 1.5}}), "must be texts"),
    "entry of a number": (file_of({"a": 1}), "not described by an object"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "data_offsets None"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4), "shape None"),
    "three offsets": (file_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4), "data_offsets"),
    "unknown type": (file_of({"a": entry("C128", [1], 0, 16)}, 16), "must be one of"),
    "negative size": (file_of({"a": entry("F32", [-1], 0, 4)}, 4), "shape"),
    "size with a fraction": (file_of({"a": entry("F32", [1.0], 0, 4)}, 4), "shape"),
    "size with an exponent": (file_of(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', 1), "shape"),
    "minus zero": (file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "shape"),
    "truth as a size": (file_of({"a": entry("BOOL", [True], 0, 1)}, 1), "shape"),
    "more than can be counted": (file_of({"a": entry("F32", [2**40, 2**40], 0, 4)}, 4), "counted"),
    "more than can be counted, times 0": (file_of({"a": entry("F32", [2**40, 2**40, 0], 0, 0)}), "counted"),
    "a size of 65 bits": (file_of({"a": entry("F32", [2**64], 0, 4)}, 4), "shape"),
    "other size": (file_of({"a": entry("F32", [2], 0, 4)}, 4), "takes 8"),
    "reversed": (file_of({"a": entry("F32", [1], 4, 0)}, 4), "takes 4"),
    "ends within a byte": (file_of({"a": entry("F4", [3], 0, 2)}, 2), "end at a byte"),
    "hole": (file_of({"a": ONE, "b": entry("F32", [1], 8, 12)}, 12), "hole of 4 bytes"),
    "hole at the start": (file_of({"a": entry("F32", [1], 4, 8)}, 8), "hole of 4 bytes"),
    "overlap": (file_of({"a": ONE, "b": entry("F32", [1], 2, 6)}, 6), "overlaps"),
    "the same bytes": (file_of({"a": ONE, "b": ONE}, 4), "overlaps"),
    "file is longer": (file_of({"a": ONE}, 5), "but the file has"),
    "file is shorter": (file_of({"a": ONE}, 3), "but the file has"),
}

STRICTER: dict[str, tuple[bytes, str]] = {
    "name twice": (
        file_of(b'{"a":' + json.dumps(ONE).encode() + b',"a":' + json.dumps(ONE).encode() + b"}", 4),
        "'a' twice",
    ),
    "metadata twice": (file_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    "type of an object": (file_of({"a": {**ONE, "dtype": {"F32": None}}}, 4), "has the type"),
    "entry of a list": (file_of(b'{"a":["F32",[1],[0,4]]}', 4), "not described by an object"),
}


@pytest.mark.parametrize("content", WELL.values(), ids=WELL.keys())
def test_header_says_the_same_as_the_library(content: bytes) -> None:
    header = decoded(content)
    told = {name: (one["dtype"], tuple(one["shape"]), len(one["data"])) for name, one in deserialize(content)}  # type: ignore[no-untyped-call]
    assert {name: (one.dtype, one.shape, one.end - one.start) for name, one in header.tensors.items()} == told
    assert [one.start for one in header.tensors.values()] == sorted(one.start for one in header.tensors.values())


@pytest.mark.row("damaged or hostile safetensors header or index")
@pytest.mark.parametrize(("content", "said"), [*BAD.values(), *STRICTER.values()], ids=[*BAD, *STRICTER])
def test_header_that_breaks_a_rule_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(HeaderRefused, match=said):
        decoded(content)


def test_the_library_agrees_but_for_what_is_said_in_the_docstring() -> None:
    assert [name for name, (content, _) in BAD.items() if is_read_by_the_library(content)] == []
    assert all(is_read_by_the_library(content) for content, _ in STRICTER.values())


def test_metadata_is_told() -> None:
    assert decoded(WELL["metadata"]).metadata == {"format": "pt", "a": "\u00e4"}
    assert decoded(WELL["metadata is null"]).metadata == {}
