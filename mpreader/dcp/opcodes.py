"""Reader of the pickle of a ``torch.save`` record, which it never runs.

:mod:`mpreader.dcp.layout` finds the shape of a tensor with it. The few opcodes that a plain tensor needs build inert
nodes; there is no import, no call and no object of any class but these, so a hostile pickle has nothing to work with.
Any other opcode is refused, and the record is left to ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickletools
from typing import Any, Final, NamedTuple

__all__ = ["Call", "Global", "Persistent", "read_opcodes"]


class Global(NamedTuple):
    """Name that unpickling would import, as ``"module name"``."""

    name: str


class Call(NamedTuple):
    """Call that unpickling would make."""

    function: Any
    arguments: Any


class Persistent(NamedTuple):
    """Reference to something that is stored beside the pickle: a storage."""

    id: Any


_MARK: Final = object()
_LITERALS: Final = frozenset({"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"})
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_opcodes(data: bytes) -> Any:
    """Returns the tree of nodes, tuples and literals that the pickle ``data`` describes.

    Raises:
        ValueError: ``data`` is not a pickle, or uses an opcode that a plain tensor does not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo)
    except (IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"malformed pickle: {error!r}") from None
    raise ValueError("pickle without an end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Do what an opcode does, with nodes in place of imports and calls."""
    if name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(Global(argument))
    elif name != "PROTO":
        _fold(name, stack)


def _fold(name: str, stack: list[Any]) -> None:
    """Replace the top of the stack by the node or tuple made of it."""
    if name == "REDUCE":
        arguments = stack.pop()
        stack.append(Call(stack.pop(), arguments))
    elif name == "BINPERSID":
        stack.append(Persistent(stack.pop()))
    elif name == "TUPLE":
        start = len(stack) - 1
        while stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("tuple without a start")
        stack[start:] = [tuple(stack[start + 1 :])]
    elif name in _TUPLES and len(stack) >= _TUPLES[name]:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    else:
        raise ValueError(f"opcode {name} is not part of a plain tensor")
