"""Unpickler of ``.metadata``: makes the objects that DCP saves there, and lets the author of the file do nothing else.

:mod:`mpreader.dcp.metadata` is its only user, and checks the objects that come out of it. A pickle is a program, and
that of a stranger may be hostile. These are the attacks, and what stops each of them:

* A length or an index of a few bytes reserves gigabytes: :func:`check_bounds` walks over the pickle beforehand.
* GLOBAL names code, such as ``os.system``: ``find_class`` gives out only the names of an allowlist. They are compared
  as they are, never walked along the dots: ``Metadata.__init__.__globals__`` is no name of the list. A name of
  torch is looked up without ``getattr``, since that imports some modules of torch when they are asked for.
* BUILD sets attributes of whatever is on top of the stack, which may be a class that the whole process uses: the
  pickle gets no such class or function, but a factory that makes the same objects and belongs to this pickle alone.
* BUILD sets attributes of a member of an enumeration. There is only one object of each member, so no factory can make
  another: the members are compared with what they were before the pickle had them, and put back.
* ``getattr``, which Python 3.11.0 to 3.11.3 use to pickle members of enumerations, leads from any object to the
  modules behind it: the pickle gets a function that looks up members and nothing else.
* BINPERSID asks the unpickler for an object that is not in the pickle: there are none.
"""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Final

import torch

from mpreader.dcp.bounds import check_bounds
from mpreader.errors import PlanError

__all__ = ["MetadataRefused", "unpickle"]


class MetadataRefused(PlanError):
    """A checkpoint's ``.metadata`` is damaged, or would do or read something that no checkpoint needs."""


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
    finally:  # also after an error: by then a member may have been changed
        unpickler.restore_members()


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, allowed_globals: Iterable[str]) -> None:
        super().__init__(stream)
        self._allowed = frozenset(allowed_globals)
        self._enums: dict[Any, type[enum.Enum]] = {}  # each enumeration, by the factory that the pickle got for it
        # Members, and their attributes before the pickle had them. By id, since the hash of a member is that of its
        # name, which is one of the attributes that can be set.
        self._members: dict[int, tuple[enum.Enum, dict[str, Any]]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self._allowed:
            return _find(module, name)
        if name in _CLASSES_BY_MODULE.get(module, ()):
            return self._factory(_find(module, name))
        if (module, name) == ("builtins", "getattr"):
            # A new function, not the bound method: what BUILD sets of that, it sets of the function of the class.
            return lambda factory, member: self._enum_member(factory, member)
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype  # has no attributes that can be set
        raise MetadataRefused(
            f"the checkpoint's .metadata needs {module}.{name}, which DCP itself never writes; nothing was loaded. "
            f"If you trust it, pass allowed_globals=({f'{module}.{name}'!r},) to S3StorageReader"
        )

    def persistent_load(self, _: Any) -> Any:
        raise MetadataRefused("the checkpoint's .metadata refers to an object outside of itself; nothing was loaded")

    def restore_members(self) -> None:
        """Undo what the pickle has set of members of enumerations.

        Raises:
            MetadataRefused: It has set something.
        """
        changed = [(member, before) for member, before in self._members.values() if _has_changed(member, before)]
        for member, before in changed:
            vars(member).clear()
            vars(member).update(before)
        if changed:
            raise MetadataRefused("the checkpoint's .metadata changes what is not its own; that was undone")

    def _factory(self, found: Any) -> Any:
        """Returns a callable, new where that is needed, that makes the objects that ``found`` makes."""
        is_type = isinstance(found, type)
        if is_type and not found.__flags__ & _HEAP_TYPE:
            return found  # made in C: has no attributes that can be set
        if is_type and found.__new__ is object.__new__:
            # The opcode NEWOBJ, which makes the objects of such a class, takes nothing but a type. There are up to
            # hundreds of thousands of them, so the function does no more than it must.
            create = object.__new__
            return type(found.__name__, (), {"__new__": lambda _: create(found)})

        def factory(*arguments: Any) -> Any:
            return found(*arguments)

        if is_type and issubclass(found, enum.Enum):
            self._enums[factory] = found
            for member in found:
                # Only the first time: when the pickle names the enumeration again, it may have changed the member.
                self._members.setdefault(id(member), (member, dict(vars(member))))
        return factory

    def _enum_member(self, factory: Any, name: Any) -> enum.Enum:
        if factory not in self._enums:
            raise MetadataRefused(
                "the checkpoint's .metadata reads an attribute, which DCP never does; nothing was loaded"
            )
        return self._enums[factory][name]


def _has_changed(member: enum.Enum, before: dict[str, Any]) -> bool:
    # By identity: an attribute that the pickle has set may be equal to whatever it is compared with.
    now = vars(member)
    return len(now) != len(before) or any(now.get(name) is not value for name, value in before.items())


def _find(module: str, name: str) -> Any:
    found: Any = import_module("pathlib" if module == "pathlib._local" else module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
