"""Reader of ``.metadata``, the pickle that says which tensors a checkpoint has and where they are stored.

The storage reader loads it before anything else. Nothing in it is trusted: :mod:`mpreader.dcp.unpickling` makes the
objects, and what they say of files and positions is checked here, so that no later step can be led to read or write
outside of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from torch.distributed.checkpoint.metadata import Metadata

from mpreader.dcp.unpickling import MetadataRefused, unpickle

__all__ = ["MetadataRefused", "is_inside", "load_metadata"]


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
        return _checked(unpickle(data, allowed_globals=allowed_globals))
    except MetadataRefused:
        raise
    except Exception as error:  # a damaged pickle fails in any way at all
        raise MetadataRefused(f"the checkpoint's .metadata is damaged: {type(error).__name__}: {error}") from error


def is_inside(path: object) -> bool:
    """Whether a relative path stays inside of the checkpoint; ``.metadata`` that names another one is refused."""
    if not isinstance(path, str) or not path or path.startswith("/") or "\0" in path:
        return False
    return {".", ".."}.isdisjoint(path.split("/"))


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
