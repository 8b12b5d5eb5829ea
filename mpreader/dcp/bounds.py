"""Bounds check of pickles: refuses a pickle that would make the unpickler reserve far more memory than the pickle has.

:mod:`mpreader.dcp.unpickling` calls it before it unpickles. The check must not run anything of the pickle. It is needed
because Python's unpickler trusts the numbers in a pickle: it reserves the announced length of a string before it knows
that so many bytes follow, and enlarges its memo (the table of objects that later opcodes refer to) up to any index that
is stored into. A pickle of ten bytes can thus reserve 32 GiB, and the kernel kills the process.

The opcodes of a pickle follow one another without jumps, so the check can walk over them from the first to the last.
A regular expression skips runs of harmless opcodes; Python code looks only at those with a length or an index.
"""

from __future__ import annotations

import pickletools
import re
from typing import Final

__all__ = ["check_bounds"]

# Opcodes that enlarge the memo up to their index. BINPUT does so, too, but an index of one byte is too small to matter.
_PUTS: Final = frozenset({"LONG_BINPUT", "PUT"})
# Size of the length field, for each kind of argument that begins with one.
_LENGTH_BYTES: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_SHORT_STRING_BYTES: Final = 100  # longer strings are rare in .metadata, and each length makes the pattern longer
# The matcher keeps about 90 bytes for each repetition, to go back to it: without a bound, a file of 80 MB took 7 GB.
_OPCODES_PER_MATCH: Final = 1024


def _harmless_pattern() -> re.Pattern[bytes]:
    """Returns a pattern of a run of harmless opcodes: no length or index in them can reserve much memory."""
    codes: dict[int, bytes] = {}  # characters of the opcodes, by the size of their arguments
    for opcode in pickletools.opcodes:
        nbytes = 0 if opcode.arg is None else opcode.arg.n
        # A negative size says that the argument has a length of its own. STOP must end the run: see check_bounds.
        if nbytes >= 0 and opcode.name not in _PUTS | {"STOP"}:
            codes[nbytes] = codes.get(nbytes, b"") + re.escape(opcode.code.encode("latin-1"))
    kinds = [b"[%s]%s" % (chars, b".{%d}" % nbytes if nbytes else b"+") for nbytes, chars in sorted(codes.items())]
    # LONG_BINPUT with an index below 2**20. Such an index reserves 16 MiB at most, and there are up to hundreds of
    # thousands of these opcodes, so Python code must not look at each.
    kinds.append(rb"r..[\0-\x0f]\0")
    # SHORT_BINUNICODE, the most frequent opcode with a length: each name of a tensor is one.
    strings = (b"%s.{%d}" % (re.escape(bytes([length])), length) for length in range(_SHORT_STRING_BYTES))
    kinds.append(b"\x8c(?:%s)" % b"|".join(strings))
    return re.compile(b"(?:%s){0,%d}" % (b"|".join(kinds), _OPCODES_PER_MATCH), re.DOTALL)


_HARMLESS: Final = _harmless_pattern()
# Size of the length field behind an opcode, by the opcode.
_LENGTHS: Final = {
    ord(opcode.code): _LENGTH_BYTES[opcode.arg.n]
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.arg.n in _LENGTH_BYTES
}
# Number of lines of text behind an opcode, by the opcode. GLOBAL and INST have two, the module and the name.
_LINES: Final = {
    ord(opcode.code): 2 if opcode.name in ("GLOBAL", "INST") else 1
    for opcode in pickletools.opcodes
    if opcode.arg is not None and opcode.arg.n == pickletools.UP_TO_NEWLINE
}
_STOP, _PUT, _LONG_BINPUT = b".pr"


def check_bounds(data: bytes) -> None:
    """Check all lengths and indices of a pickle, up to its STOP or the first byte that is no opcode.

    Unpickling ends at the same place, so what follows it need not be checked.

    Args:
        data: The whole pickle, of any protocol.

    Raises:
        ValueError: A length goes beyond the end of ``data``, an index of the memo is larger than ``data`` has bytes, or
            a line of text has no end.
    """
    # Always the position of an opcode. If the walk ever began inside of an argument, it would take other bytes for
    # opcodes than the unpickler does, and a hostile pickle could hide a length from it.
    position = 0
    while True:
        at = _HARMLESS.match(data, position).end()  # type: ignore[union-attr]  # it matches the empty string, too
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
            return  # nothing has matched here: this byte is no opcode, and the unpickler refuses it
        else:
            position = at  # the match has ended at its bound, _OPCODES_PER_MATCH


def _end_of_lines(data: bytes, at: int, lines: int) -> int:
    """Returns the position behind the next ``lines`` line ends."""
    for _ in range(lines):
        at = data.find(b"\n", at) + 1
        if not at:
            raise ValueError("a line without an end")
    return at


def _check_index(index: int, data: bytes) -> None:
    # A pickler numbers the entries of the memo from 0 on, and stores each with an opcode of at least one byte, so an
    # honest index is never larger than the pickle.
    if index > len(data):
        raise ValueError(f"index {index} of the memo in a pickle of {len(data)} bytes")
