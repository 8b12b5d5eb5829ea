"""Reader of ``.metadata``, the pickle that says which tensors a checkpoint has and where they are stored.

The storage reader calls it at the start of each load. It must not trust anything in the file:
:mod:`mpreader.dcp.unpickling` makes the objects, and this module checks the files and positions that they name, so that
no later step reads outside of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from torch.distributed.checkpoint.metadata import Metadata

from mpreader.dcp.unpickling import MetadataRefused, unpickle
from mpreader.readers.load_plan import is_extent, is_inside

__all__ = ["MetadataRefused", "load_metadata"]


def load_metadata(stream: IO[bytes], *, allowed_globals: Iterable[str] = ()) -> Metadata:
    """Read the metadata of a checkpoint, and check that every file it names lies inside of the checkpoint.

    Args:
        stream: The ``.metadata`` file.
        allowed_globals: Further classes that the file may use, such as ``"package.module.Name"``. They are imported and
            called with arguments from the file, so name only classes that are safe with hostile arguments.

    Raises:
        MetadataRefused: The file is damaged, needs a class that is not allowed, or names a path that leads out of the
            checkpoint.
        TransportError: The stream can't be read.
    """
    data = stream.read()  # outside of the try: an error of the transport does not mean that the file is damaged
    try:
        return _checked(unpickle(data, allowed_globals=allowed_globals))
    except MetadataRefused:
        raise
    except Exception as error:  # unpickling a damaged file, and touching its objects, can raise any type of error
        raise MetadataRefused(f"the checkpoint's .metadata is damaged: {type(error).__name__}: {error}") from error


def _checked(metadata: Any) -> Metadata:
    # The pickle sets the attributes, not Metadata.__init__, so any of them may be missing or of another type.
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise MetadataRefused(f"the checkpoint's .metadata holds {type(metadata).__name__}, not a Metadata")
    storage_data = getattr(metadata, "storage_data", None)
    if storage_data is None:
        return metadata  # None is DCP's default, so no sign of damage; a plan that reads an item is refused later
    if not isinstance(storage_data, dict):
        raise MetadataRefused(f"the checkpoint's .metadata has a {type(storage_data).__name__} as its storage data")
    safe_paths: set[str] = set()  # each path is checked once: there are few files, with many items in each
    for index, stored in storage_data.items():
        _check_location(index, stored, safe_paths)
    return metadata


def _check_location(index: Any, stored: Any, safe_paths: set[str]) -> None:
    try:
        path, offset, length = stored.relative_path, stored.offset, stored.length
    except AttributeError as error:
        raise MetadataRefused(f"the checkpoint's .metadata doesn't say where {index} is stored: {error}") from None
    # The exact type is checked: an object that the pickle has made may equal a safe path and yet be another object.
    if type(path) is not str or path not in safe_paths:
        if not is_inside(path):
            raise MetadataRefused(f"the checkpoint's .metadata places {index} outside of the checkpoint: {path!r}")
        safe_paths.add(path)
    if not is_extent(offset, length):
        raise MetadataRefused(
            f"the checkpoint's .metadata gives {index} an impossible place: offset {offset!r}, length {length!r}"
        )
    descriptors = getattr(stored, "transform_descriptors", None)  # older torch has no such attribute
    if descriptors is None:
        return
    if not isinstance(descriptors, (list, tuple)) or not all(isinstance(name, str) for name in descriptors):
        raise MetadataRefused(f"the checkpoint's .metadata names no valid transformation of {index}: {descriptors!r}")
