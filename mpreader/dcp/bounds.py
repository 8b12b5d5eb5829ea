"""Bounds check of pickles: refuses one that would take more memory than its own size explains.

:mod:`mpreader.dcp.unpickling` makes it before it unpickles. Python's unpickler reserves what a length says before it
looks if so many bytes follow, and enlarges its memo to whatever index is put into it: ten bytes are enough to take
32 GiB and be killed for it.

Opcodes follow one another without jumps, so they can be walked beforehand. A regular expression skips those that are
harmless, as many as there are in a row; only those with a length or an index cost a step of Python.
"""

from __future__ import annotations

import pickletools
import re
from typing import Final

__all__ = ["check_bounds"]

# Opcodes whose index the memo is enlarged to. That of BINPUT has one byte: too small to matter.
_PUTS: Final = frozenset({"LONG_BINPUT", "PUT"})
_LENGTH_BYTES: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_SHORT_STRING_BYTES: Final = 100
_STEPS_AT_ONCE: Final = 1024  # a regular expression takes memory for each


def _fixed_pattern() -> re.Pattern[bytes]:
    """Returns what matches opcodes whose arguments have a fixed size and are harmless, and the most frequent others."""
    codes: dict[int, bytes] = {}
    for opcode in pickletools.opcodes:
        nbytes = 0 if opcode.arg is None else opcode.arg.n
        if nbytes >= 0 and opcode.name not in _PUTS | {"STOP"}:
            codes[nbytes] = codes.get(nbytes, b"") + re.escape(opcode.code.encode("latin-1"))
    kinds = [b"[%s]%s" % (chars, b".{%d}" % nbytes if nbytes else b"+") for nbytes, chars in sorted(codes.items())]
    kinds.append(rb"r..[\0-\x0f]\0")  # so small an index costs nothing worth a look
    # The most frequent ones with a length: SHORT_BINUNICODE, a tensor's name.
    strings = (b"%s.{%d}" % (re.escape(bytes([length])), length) for length in range(_SHORT_STRING_BYTES))
    kinds.append(b"\x8c(?:%s)" % b"|".join(strings))
    return re.compile(b"(?:%s){0,%d}" % (b"|".join(kinds), _STEPS_AT_ONCE), re.DOTALL)


_FIXED: Final = _fixed_pattern()
# Bytes of the length that follows an opcode.
_LENGTHS: Final = {
    ord(opcode.code): _LENGTH_BYTES[opcode.arg.n]
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.arg.n in _LENGTH_BYTES
}
# Lines of text that follow an opcode.
_LINES: Final = {
    ord(opcode.code): 2 if opcode.name in ("GLOBAL", "INST") else 1
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE
}
_STOP, _PUT, _LONG_BINPUT = b".pr"


def check_bounds(data: bytes) -> None:
    """Walk over a pickle up to its end, or to the first byte that is no opcode, where unpickling ends, too.

    Raises:
        ValueError: A length goes beyond the end, or an index of the memo beyond any that so many bytes can fill.
    """
    position = 0  # of an opcode, always: from any other byte on, all would be read as something else
    while True:
        at = _FIXED.match(data, position).end()  # type: ignore[union-attr]  # it matches the empty string, too
        if at >= len(data) or data[at] == _STOP:
            return
        code = data[at]
        if code in _LENGTHS:
            start = at + 1 + _LENGTHS[code]
            length = int.from_bytes(data[at + 1 : start], "little")
            if length > len(data) - start:
                raise ValueError(f"{length} bytes are announced at byte {at} of {len(data)}")
            position = start + length
        elif code == _LONG_BINPUT:
            position = at + 5
            _check_index(int.from_bytes(data[at + 1 : position], "little"), data)
        elif code in _LINES:
            position = _end_of_lines(data, at, _LINES[code])
            if code == _PUT:
                _check_index(int(data[at + 1 : position]), data)
        elif at == position:
            return  # no opcode
        else:
            position = at  # after _STEPS_AT_ONCE harmless ones


def _end_of_lines(data: bytes, at: int, lines: int) -> int:
    for _ in range(lines):
        at = data.find(b"\n", at) + 1
        if not at:
            raise ValueError("a line without an end")
    return at


def _check_index(index: int, data: bytes) -> None:
    # Pickles number the entries of the memo from 0 on, and each entry takes an opcode of at least one byte.
    if index > len(data):
        raise ValueError(f"index {index} of the memo in a pickle of {len(data)} bytes")
