"""Reads ``.metadata``, a pickle, without trusting it: only the classes that DCP writes can be made by it."""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Iterable
from importlib import import_module
from operator import methodcaller
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mpreader.dcp.bounds import check_bounds
from mpreader.errors import PlanError

__all__ = ["MetadataRefused", "is_inside", "load_metadata"]


class MetadataRefused(PlanError):
    """A checkpoint's ``.metadata`` is damaged, or would do or read something that no checkpoint needs."""


# Data only: none of these runs code of the checkpoint's author, whatever it is called with.
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
    # What the checkpoint was saved to; Python 3.13 has moved the classes.
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath"},
}

_HEAP_TYPE: Final = 1 << 9


def load_metadata(stream: IO[bytes], *, allowed_globals: Iterable[str] = ()) -> Metadata:
    """Read the metadata of a checkpoint, and check that all it names lies inside of the checkpoint.

    Args:
        stream: The ``.metadata`` file.
        allowed_globals: Further classes that may be made, such as ``"package.module.Name"``. They are imported, and
            called with what the file says: name only what you trust with hostile arguments.

    Raises:
        MetadataRefused: The file is damaged, needs a class that is not allowed, or names a place outside.
        TransportError: The stream can't be read.
    """
    data = stream.read()
    try:
        check_bounds(data)
        return _checked(_Unpickler(io.BytesIO(data), allowed_globals).load_unchanged())
    except MetadataRefused:
        raise
    except Exception as error:  # a damaged pickle fails in any way at all
        raise MetadataRefused(f"the checkpoint's .metadata is damaged: {type(error).__name__}: {error}") from error


def is_inside(path: object) -> bool:
    """Whether a relative path stays inside of the checkpoint; ``.metadata`` that names another one is refused."""
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        return False
    return {".", ".."}.isdisjoint(path.split("/"))


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed_globals: Iterable[str]) -> None:
        super().__init__(stream)
        self._allowed = frozenset(allowed_globals)
        self._enums: dict[Any, type[enum.Enum]] = {}  # by what stands for them
        # As they were; by identity, since the hash of a member is that of its name, which can be set.
        self._members: dict[int, tuple[enum.Enum, dict[str, Any]]] = {}

    def load_unchanged(self) -> Any:
        """Load, and leave all members of enumerations as they were: those are shared by the whole process."""
        try:
            return self.load()
        finally:
            changed = [(member, before) for member, before in self._members.values() if _has_changed(member, before)]
            for member, before in changed:
                vars(member).clear()
                vars(member).update(before)
            if changed:
                raise MetadataRefused("the checkpoint's .metadata changes what is not its own; that was undone")

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in self._allowed:
            return _find(module, name)
        if name in _CLASSES_BY_MODULE.get(module, ()):
            return self._stand_in(_find(module, name))
        if (module, name) == ("builtins", "getattr"):
            return lambda members, member: self._enum_member(members, member)
        # Not getattr: torch imports some of its modules, for seconds, when they are asked for.
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise MetadataRefused(
            f"the checkpoint's .metadata needs {module}.{name}, which DCP itself never writes; nothing was loaded. "
            f"If you trust it, pass allowed_globals=({f'{module}.{name}'!r},) to S3StorageReader"
        )

    def persistent_load(self, _: Any) -> Any:
        raise MetadataRefused("the checkpoint's .metadata refers to an object outside of itself; nothing was loaded")

    def _stand_in(self, found: Any) -> Any:
        """What makes the same objects: a pickle can set attributes of whatever it has, and this belongs to no other."""
        if not isinstance(found, type):
            return lambda *arguments: found(*arguments)
        if not found.__flags__ & _HEAP_TYPE:
            return found  # made in C: has no attributes that can be set
        new: Any = found.__new__
        attributes: dict[str, Any] = {"__new__": lambda _, *arguments: new(found, *arguments)}  # NEWOBJ
        if new is object.__new__:  # the same without a step of Python, for there are many of these
            attributes = {"__new__": methodcaller("make", found), "make": staticmethod(object.__new__)}
        call = {"__call__": lambda _, *arguments: found(*arguments)}  # REDUCE
        stand_in = type("StandIn", (type,), call)(found.__name__, (), attributes)
        if issubclass(found, enum.Enum):
            self._enums[stand_in] = found
            for member in found:
                self._members.setdefault(id(member), (member, dict(vars(member))))
        return stand_in

    def _enum_member(self, members: Any, name: Any) -> enum.Enum:
        """What ``getattr`` may be used for: Python 3.11.0 to 3.11.3 pickle a member of an enumeration by it."""
        if members not in self._enums:
            raise MetadataRefused(
                "the checkpoint's .metadata reads an attribute, which DCP never does; nothing was loaded"
            )
        return self._enums[members][name]


def _has_changed(member: enum.Enum, before: dict[str, Any]) -> bool:
    now = vars(member)  # not compared by equality, which may be anything
    return len(now) != len(before) or any(now.get(name) is not value for name, value in before.items())


def _find(module: str, name: str) -> Any:
    found: Any = import_module("pathlib" if module == "pathlib._local" else module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _checked(metadata: Any) -> Metadata:
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise MetadataRefused(f"the checkpoint's .metadata holds {type(metadata).__name__}, not a Metadata")
    _check_places(getattr(metadata, "storage_data", None))
    return metadata


def _check_places(storage_data: Any) -> None:
    if storage_data is None:
        return
    if not isinstance(storage_data, dict):
        raise MetadataRefused(f"the checkpoint's .metadata has a {type(storage_data).__name__} as its storage data")
    safe_paths: set[str] = set()
    for index, stored in storage_data.items():
        try:
            path, offset, length = stored.relative_path, stored.offset, stored.length
        except AttributeError as error:
            raise MetadataRefused(f"the checkpoint's .metadata doesn't say where {index} is stored: {error}") from None
        if type(path) is not str or path not in safe_paths:
            _check_path(index, path)
            safe_paths.add(path)
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
            raise MetadataRefused(
                f"the checkpoint's .metadata gives {index} an impossible place: offset {offset!r}, length {length!r}"
            )
        _check_descriptors(index, getattr(stored, "transform_descriptors", None))


def _check_path(index: Any, path: Any) -> None:
    if not is_inside(path):
        raise MetadataRefused(f"the checkpoint's .metadata places {index} outside of the checkpoint: {path!r}")


def _check_descriptors(index: Any, descriptors: Any) -> None:
    if descriptors is None:
        return
    if not isinstance(descriptors, (list, tuple)) or not all(isinstance(name, str) for name in descriptors):
        raise MetadataRefused(f"the checkpoint's .metadata names no valid transformation of {index}: {descriptors!r}")
