"""Pickles whose lengths and indices would make unpickling reserve much memory are refused, and no others."""

from __future__ import annotations

import pickle
import pickletools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpreader.dcp.bounds import check_bounds

values = st.recursive(
    st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.binary(), st.just("long" * 90)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner), st.tuples(inner, inner)),
)


@given(value=values, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_pickles_that_python_writes_are_within_bounds(value: Any, protocol: int) -> None:
    check_bounds(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_with_a_long_memo_is_within_bounds(protocol: int) -> None:
    check_bounds(pickle.dumps([str(number) * 50 for number in range(5000)], protocol))


@pytest.mark.parametrize(
    "data",
    [
        b"Nr\xff\xff\xff\x7f.",  # LONG_BINPUT
        b"Np2147483647\n.",  # PUT
        b"B\xff\xff\xff\x7fabc.",  # BINBYTES
        b"X\xff\xff\xff\x7fabc.",
        b"\x8e" + (2**40).to_bytes(8, "little") + b"abc.",  # BINBYTES8
        b"\x96" + (2**40).to_bytes(8, "little") + b"abc.",  # BYTEARRAY8
        b"\x8c\x09abc.",
        b"\x8b\xff\xff\xff\x7fabc.",  # LONG4
        b"Iwithout an end",
        b"cmodule\nwithout an end",
    ],
)
@pytest.mark.parametrize("before", [b"", b"\x80\x04", b"(K\x01K\x02" * 5000, pickle.dumps("name", 4)[:-1]])
def test_pickle_that_would_reserve_more_than_it_has_is_refused(before: bytes, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"byte|end"):
        check_bounds(before + data)


@given(data=st.binary(max_size=200))
def test_bounds_of_anything_are_decided(data: bytes) -> None:
    try:
        check_bounds(data)
    except ValueError:
        return


@given(data=st.binary(max_size=60))
def test_walk_goes_as_far_as_that_of_pickletools(data: bytes) -> None:
    """A put that is refused behind whatever pickletools can read must not be overlooked."""
    try:
        walked = list(pickletools.genops(data + b"."))
    except Exception:  # noqa: BLE001  # not a pickle as far as that
        return
    if walked[-1][2] == len(data):
        with pytest.raises(ValueError, match="memo"):
            check_bounds(data + b"r\xff\xff\xff\x7f.")
