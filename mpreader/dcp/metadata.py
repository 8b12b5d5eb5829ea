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
from mpreader.readers.load_plan import is_extent, is_inside

__all__ = ["MetadataRefused", "load_metadata"]


def load_metadata(stream: IO[bytes], *, allowed_globals: Iterable[str] = ()) -> Metadata:
    """Read the metadata of a checkpoint, and check that all it names lies inside of the checkpoint.

    Args:
        stream: The ``.metadata`` file.
        allowed_globals: Further classes that may be made, such as ``"package.module.Name"``. They are imported, and
            called with what the file says: name only what you trust with hostile arguments.

    Raises:
        MetadataRefused: The file is damaged, needs a class that is not allowed, or names a path that leads out of the
            checkpoint.
        TransportError: The stream can't be read.
    """
    data = stream.read()
    try:
        return _checked(unpickle(data, allowed_globals=allowed_globals))
    except MetadataRefused:
        raise
    except Exception as error:  # a damaged pickle fails in any way at all
        raise MetadataRefused(f"the checkpoint's .metadata is damaged: {type(error).__name__}: {error}") from error


def _checked(metadata: Any) -> Metadata:
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise MetadataRefused(f"the checkpoint's .metadata holds {type(metadata).__name__}, not a Metadata")
    storage_data = getattr(metadata, "storage_data", None)
    if storage_data is None:
        return metadata  # DCP's own default; a plan that reads an item of it is refused
    if not isinstance(storage_data, dict):
        raise MetadataRefused(f"the checkpoint's .metadata has a {type(storage_data).__name__} as its storage data")
    safe_paths: set[str] = set()  # there are few files, and many items in each
    for index, stored in storage_data.items():
        _check_location(index, stored, safe_paths)
    return metadata


def _check_location(index: Any, stored: Any, safe_paths: set[str]) -> None:
    try:
        path, offset, length = stored.relative_path, stored.offset, stored.length
    except AttributeError as error:
        raise MetadataRefused(f"the checkpoint's .metadata doesn't say where {index} is stored: {error}") from None
    # By exact type: an object that the pickle has made may be equal to a safe path and still be another one.
    if type(path) is not str or path not in safe_paths:
        if not is_inside(path):
            raise MetadataRefused(f"the checkpoint's .metadata places {index} outside of the checkpoint: {path!r}")
        safe_paths.add(path)
    if not is_extent(offset, length):
        raise MetadataRefused(
            f"the checkpoint's .metadata gives {index} an impossible place: offset {offset!r}, length {length!r}"
        )
    descriptors = getattr(stored, "transform_descriptors", None)
    if descriptors is None:
        return
    if not isinstance(descriptors, (list, tuple)) or not all(isinstance(name, str) for name in descriptors):
        raise MetadataRefused(f"the checkpoint's .metadata names no valid transformation of {index}: {descriptors!r}")
