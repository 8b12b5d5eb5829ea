"""Unpickler of ``.metadata``: makes the objects that DCP saves there, and lets the author of the file do nothing else.

:mod:`mpreader.dcp.metadata` is its only user, and checks the values of the objects; this module must not trust a byte
of the file. A pickle is a program for a small stack machine, and the author of a checkpoint may be hostile. These are
the attacks, each with the protection against it:

* A length or an index of a few bytes reserves gigabytes. :func:`check_bounds` checks all of them before unpickling.
* The opcode GLOBAL names code to import, such as ``os.system``. ``find_class`` returns only names of an allowlist. A
  name is compared as a whole, and its dots are not followed, so ``Metadata.__init__.__globals__`` is refused. A dtype
  of torch is looked up without ``getattr``, because ``getattr`` makes torch import some of its modules.
* The opcode BUILD sets attributes of the object on top of the stack, which may be a class that the whole process uses.
  The pickle never gets such a class or function itself, but a factory that makes the same objects and that only this
  pickle uses.
* BUILD may also set attributes of a member of an enumeration. Each member exists once in a process, so a factory is of
  no help. The members are compared with a copy that was made before the pickle got them, and restored.
* Python 3.11.0 to 3.11.3 pickle members of enumerations by ``getattr``, which can reach the globals of any module. In
  its place the pickle gets a function that looks up members of enumerations and nothing else.
* The opcode BINPERSID asks the unpickler for an object outside of the pickle. It is always refused.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Final

import torch

from mpreader.dcp.bounds import check_bounds
from mpreader.errors import PlanError

__all__ = ["MetadataRefused", "unpickle"]


class MetadataRefused(PlanError):
    """A checkpoint's ``.metadata`` is damaged, or would run or read something that no checkpoint needs."""


# Classes of data, and one function that only looks up a table: none of them runs code that the author of a checkpoint
# chose, whatever the arguments are.
_CLASSES_BY_MODULE: Final = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # Before torch 2.3.
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
    "builtins": {"complex", "frozenset", "set"},
    # The path that the checkpoint was saved to; Python 3.13 has moved the classes.
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath"},
}

_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the type was made by a class statement


def unpickle(data: bytes, *, allowed_globals: Iterable[str] = ()) -> Any:
    """Unpickle a ``.metadata`` file.

    Args:
        data: The whole file.
        allowed_globals: Further classes that the pickle gets as they are, such as ``"package.module.Name"``.

    Raises:
        MetadataRefused: The pickle needs a name that is not allowed, or has changed a member of an enumeration.
        Exception: The pickle is damaged; unpickling it fails with any type of error.
    """
    check_bounds(data)
    unpickler = _Unpickler(io.BytesIO(data), allowed_globals)
    try:
        return unpickler.load()
    finally:  # also after an error: the pickle may have changed a member before it failed
        unpickler.restore_members()


class _Unpickler(pickle.Unpickler):
    """Unpickler of one pickle, with the protections that the module's docstring lists."""

    def __init__(self, stream: io.BytesIO, allowed_globals: Iterable[str]) -> None:
        super().__init__(stream)
        self._allowed = frozenset(allowed_globals)
        self._enums: dict[Any, type[enum.Enum]] = {}  # each enumeration, by the factory that the pickle got for it
        # Members that the pickle can reach, each with a copy of its attributes from before. The keys are ids, not the
        # members: the hash of a member is that of its name, an attribute that the pickle can set.
        self._members: dict[int, tuple[enum.Enum, dict[str, Any]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        # The user trusts these names, so the pickle gets them as they are, without a factory.
        if f"{module}.{name}" in self._allowed:
            return _find(module, name)
        if name in _CLASSES_BY_MODULE.get(module, ()):
            return self._factory(_find(module, name))
        if (module, name) == ("builtins", "getattr"):
            # A new function: BUILD writes to the __dict__ of its object. It holds the dictionary only, not the
            # unpickler, which holds everything that it has handed out: before Python 3.11.4 the garbage collector
            # doesn't see that, and a circle would keep the metadata of every load for ever.
            enums = self._enums
            return lambda factory, member: _enum_member(enums, factory, member)
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype  # no factory is needed: a dtype has no attributes that can be set
        raise MetadataRefused(
            f"the checkpoint's .metadata needs {module}.{name}, which DCP itself never writes; nothing was loaded. "
            f"If you trust it, pass allowed_globals=({f'{module}.{name}'!r},) to S3StorageReader"
        )

    def persistent_load(self, _: Any) -> Any:
        raise MetadataRefused("the checkpoint's .metadata refers to an object outside of itself; nothing was loaded")

    def restore_members(self) -> None:
        """Restore the attributes of the members of enumerations that the pickle has changed.

        Raises:
            MetadataRefused: A member was changed.
        """
        changed = [(member, before) for member, before in self._members.values() if _has_changed(member, before)]
        for member, before in changed:
            vars(member).clear()
            vars(member).update(before)
        if changed:
            raise MetadataRefused("the checkpoint's .metadata changes what is not its own; that was undone")

    def _factory(self, found: Any) -> Any:
        """Returns a callable that makes the same objects as ``found``, and has no attributes that others can see."""
        is_type = isinstance(found, type)
        if is_type and not found.__flags__ & _HEAP_TYPE:
            return found  # a type written in C has no attributes that can be set
        if is_type and found.__new__ is object.__new__:
            # The opcode NEWOBJ makes the objects of such a class, and accepts only a type: a function would not do.
            # A pickle may have hundreds of thousands of these opcodes, so the new type's __new__ is kept minimal.
            create = object.__new__
            return type(found.__name__, (), {"__new__": lambda _: create(found)})

        def factory(*arguments: Any) -> Any:
            return found(*arguments)

        if is_type and issubclass(found, enum.Enum):
            self._enums[factory] = found
            for member in found:
                # setdefault keeps the first copy: when the pickle names the enumeration a second time, it may already
                # have changed the member.
                self._members.setdefault(id(member), (member, dict(vars(member))))
        return factory


def _enum_member(enums: Mapping[Any, type[enum.Enum]], factory: Any, name: Any) -> enum.Enum:
    """Do what ``getattr`` would do for an enumeration, and refuse everything else."""
    if factory not in enums:
        raise MetadataRefused("the checkpoint's .metadata reads an attribute, which DCP never does; nothing was loaded")
    return enums[factory][name]


def _has_changed(member: enum.Enum, before: dict[str, Any]) -> bool:
    # Compared by identity: the pickle may set an object whose __eq__ says True to everything.
    now = vars(member)
    return len(now) != len(before) or any(now.get(name) is not value for name, value in before.items())


def _find(module: str, name: str) -> Any:
    # A checkpoint that Python 3.13 wrote names pathlib._local, which other versions of Python do not have.
    found: Any = import_module("pathlib" if module == "pathlib._local" else module)
    # Following the dots is safe here: the whole name is in the allowlist, or the user has allowed it.
    for part in name.split("."):
        found = getattr(found, part)
    return found
