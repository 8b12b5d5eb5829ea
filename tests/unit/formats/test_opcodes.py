from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.formats.opcodes import Call, Global, read_opcodes

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=5).map(tuple),
)


@given(value=plain)
def test_opcodes_of_plain_values_give_those_values(value: object) -> None:
    assert read_opcodes(pickle.dumps(value, protocol=2)) == value


def test_opcodes_of_a_call_give_an_inert_node() -> None:
    assert read_opcodes(b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.") == Call(Global("os system"), ("ls",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"R.",
        b"t.",
        b"\x85.",
        b"h\x05.",
        b"K\x01",
        b"(K\x01.x",
        b"cos\n",
        b"\x8a\xff",
        b"}.",
        b"cos\nsystem\n)b.",
    ],
)
def test_opcodes_refuse_what_no_tensor_needs(data: bytes) -> None:
    if data == b"(K\x01.x":
        assert read_opcodes(data) == 1  # the end is where the pickle says
        return
    with pytest.raises(ValueError, match=r"pickle|opcode|tuple|expected|not enough|newline"):
        read_opcodes(data)


@given(data=st.binary(max_size=60))
def test_opcodes_of_arbitrary_bytes_give_a_value_or_value_error(data: bytes) -> None:
    try:
        read_opcodes(data)
    except ValueError:
        return
    assert b"." in data


def test_opcodes_do_not_allocate_for_a_huge_memo_index() -> None:
    # The C unpickler reserves an array as long as the index.
    assert read_opcodes(b"K\x01r\xff\xff\xff\xff.") == 1
