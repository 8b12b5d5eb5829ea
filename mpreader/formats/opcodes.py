"""Reader of the pickle of a ``torch.save`` record; it makes a tree of the pickle and never runs it.

:mod:`mpreader.formats.torch_pickle` uses it to find the shape of a tensor. It must not import or call anything that
the pickle names: an import becomes a :class:`Global` and a call a :class:`Call`, which only hold their parts, so a
hostile pickle can do no harm. It knows the few opcodes that a plain tensor needs and refuses all others; the record is
then read by ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import pickletools
from typing import Any, Final, NamedTuple

__all__ = ["Call", "Global", "Persistent", "read_opcodes"]


class Global(NamedTuple):
    """Object that unpickling would import.

    Attributes:
        name: Its module and name, with a space between them: ``"torch FloatStorage"``.
    """

    name: str


class Call(NamedTuple):
    """Call that unpickling would make.

    Attributes:
        function: The function: a :class:`Global` if the pickle is honest, but any node is possible.
        arguments: The arguments: a tuple of nodes if the pickle is honest, but any node is possible.
    """

    function: Any
    arguments: Any


class Persistent(NamedTuple):
    """Reference to an object that is stored beside the pickle; in a record of a tensor it is the storage.

    Attributes:
        id: The description by which ``torch.load`` finds the storage: a tuple if the pickle is honest.
    """

    id: Any


_MARK: Final = object()  # start of a tuple, on the stack; a new object, so that no value of the pickle can equal it
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
    # A damaged pickle may take from an empty stack, or refer to an entry of the memo that it never stored.
    except (IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"malformed pickle: {error!r}") from None
    raise ValueError("pickle without an end")


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    """Run an opcode, with nodes in place of imports and calls."""
    if name in _LITERALS:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]  # a dictionary, so that a huge index takes no memory
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name == "GLOBAL":
        stack.append(Global(argument))
    elif name != "PROTO":  # the protocol's number changes nothing for these opcodes
        _combine(name, stack)


def _combine(name: str, stack: list[Any]) -> None:
    """Replace the values on top of the stack by the node or tuple that an opcode makes of them."""
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
    elif name in _TUPLES and len(stack) >= _TUPLES[name]:  # a slice of a shorter stack would make a shorter tuple
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    else:
        raise ValueError(f"opcode {name} is not part of a plain tensor")
