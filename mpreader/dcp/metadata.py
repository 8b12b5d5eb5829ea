"""Reads ``.metadata``, a pickle, without trusting it: only the classes that DCP writes can be made by it."""

from __future__ import annotations

import enum
import io
import pickle
from collections.abc import Iterable
from importlib import import_module
from typing import IO, Any, Final

import torch
from torch.distributed.checkpoint.metadata import Metadata

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
        metadata = _Unpickler(io.BytesIO(data), allowed_globals).load()
    except MetadataRefused:
        raise
    except Exception as error:  # a damaged pickle fails in any way at all
        raise MetadataRefused(f"the checkpoint's .metadata is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise MetadataRefused(f"the checkpoint's .metadata holds {type(metadata).__name__}, not a Metadata")
    _check_places(getattr(metadata, "storage_data", None))
    return metadata


def is_inside(path: object) -> bool:
    """Whether a relative path stays inside of the checkpoint; ``.metadata`` that names another one is refused."""
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        return False
    return {".", ".."}.isdisjoint(path.split("/"))


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed_globals: Iterable[str]) -> None:
        super().__init__(stream)
        self._allowed = frozenset(allowed_globals)

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES_BY_MODULE.get(module, ()) or f"{module}.{name}" in self._allowed:
            found: Any = import_module("pathlib" if module == "pathlib._local" else module)
            for part in name.split("."):
                found = getattr(found, part)
            return found
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise MetadataRefused(
            f"the checkpoint's .metadata needs {module}.{name}, which DCP itself never writes; nothing was loaded. "
            f"If you trust it, pass allowed_globals=({f'{module}.{name}'!r},) to S3StorageReader"
        )

    def persistent_load(self, _: Any) -> Any:
        raise MetadataRefused("the checkpoint's .metadata refers to an object outside of itself; nothing was loaded")


def _enum_member(members: Any, name: Any) -> enum.Enum:
    """What ``getattr`` may be used for: Python 3.11.0 to 3.11.3 pickle a member of an enumeration by it."""
    if not (isinstance(members, type) and issubclass(members, enum.Enum)):
        raise MetadataRefused("the checkpoint's .metadata reads an attribute, which DCP never does; nothing was loaded")
    return members[name]


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
