"""A checkpoint's state in memory: made of what ``.metadata`` says, filled, and nested as it was saved.

::

    read_metadata ──> empty_state (no memory yet) ──> check_memory ──> allocate ──> read_into ──> nest

It is one process that loads all of it: nothing is shared out among the ranks of ``torch.distributed``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from mpreader.config import PoolConfig
from mpreader.dcp.metadata import MetadataRefused
from mpreader.errors import MpreaderError, ObjectMissing, PlanError
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.readers.client import S3Client
from mpreader.s3 import parse_s3_uri

if TYPE_CHECKING:
    from mpreader.dcp.filesystem import S3FileSystem
    from mpreader.dcp.reader import S3StorageReader

__all__ = [
    "allocate",
    "check_memory",
    "empty_state",
    "nest",
    "plan_whole",
    "read_into",
    "read_metadata",
    "state_bytes",
    "touch_memory",
]

# Lists may have places that nothing was saved for; more of them than this only a forged .metadata has.
_MOST_EMPTY_PLACES: Final = 1 << 20
_MOST_NAMED: Final = 5

LoadItem = Callable[[str, io.BytesIO], Any]


def read_metadata(reader: S3StorageReader) -> Metadata:
    """Read a checkpoint's ``.metadata``; where there is none, the error says what is there instead.

    Raises:
        ObjectMissing: There is no checkpoint.
        MpreaderError: As for :meth:`S3StorageReader.read_metadata`.
    """
    try:
        return reader.read_metadata()
    except ObjectMissing as error:
        hint = _hint(_client_of(reader), str(reader.path))
        if not hint:
            raise
        raise ObjectMissing(
            f"{error}; {hint}", bucket=error.bucket, key=error.key, range=error.range, attempts=error.attempts
        ) from error.__cause__


def empty_state(metadata: Metadata, match: str | Iterable[str] | None = None) -> dict[str, Any]:
    """What a checkpoint holds, by name and not nested, without memory.

    Args:
        metadata: The checkpoint's.
        match: Patterns, as for :func:`load_checkpoint`.

    Returns:
        For each item a tensor on the meta device, or None if it is no tensor.

    Raises:
        PlanError: No name matches, though there are some.
        MetadataRefused: Something is described that can't be.
    """
    entries: dict[str, Any] = metadata.state_dict_metadata
    wanted = None if match is None else ((match,) if isinstance(match, str) else tuple(match))
    with _described(metadata):
        state = {
            fqn: _empty(entry)
            for fqn, entry in entries.items()
            if wanted is None or any(fnmatchcase(fqn, pattern) for pattern in wanted)
        }
    if wanted is not None and entries and not state:
        raise PlanError(
            f"nothing in the checkpoint matches {' or '.join(map(repr, wanted))}; it holds {len(entries)} items, the "
            f"first is {next(iter(entries))!r}"
        )
    return state


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of the tensors of a state."""
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def check_memory(state: Mapping[str, Any], reader: S3StorageReader, pool_config: PoolConfig | None) -> None:
    """Refuse to load what the host can't hold: the kernel would kill somebody for it.

    Args:
        state: From :func:`empty_state`.
        reader: Reads it.
        pool_config: Settings of the pool that will be used.

    Raises:
        PlanError: The tensors, and the shared memory on the way to them, take more than the memory that is free under
            the cgroup's limit.
    """
    host = Host.now()
    window = size_pool(pool_config or PoolConfig(), _client_of(reader).s3client_config, host).window_bytes
    needed = state_bytes(state)
    if needed and needed + window > host.free_memory:
        raise PlanError(
            f"{reader.path}: its tensors take {needed} bytes, and up to {window} bytes of shared memory are used "
            f"to load them, but only {host.free_memory} bytes of memory are free here; select some of them "
            "(match=, --match)"
        )


def allocate(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same state with its tensors in memory, not filled."""
    return {
        fqn: torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else None
        for fqn, value in state.items()
    }


def touch_memory(state: Mapping[str, Any]) -> None:
    """Fill the tensors of a state from :func:`allocate` with zeros, so that a timed load pays for no page faults."""
    for value in state.values():
        if isinstance(value, torch.Tensor) and value.numel():
            # As bytes, since torch can't fill tensors of every type.
            value.reshape(-1).view(torch.uint8).zero_()


def plan_whole(metadata: Metadata, state: Mapping[str, Any]) -> LoadPlan:
    """What is read to fill a state from :func:`empty_state` or :func:`allocate`.

    Raises:
        MetadataRefused: Something is described that can't be, or that was stored nowhere.
    """
    with _described(metadata):
        if metadata.storage_data is None:
            raise ValueError("it doesn't say where they are stored")
        plan = create_default_local_load_plan(dict(state), metadata)
        for item in plan.items:
            metadata.storage_data[item.storage_index]
    return plan


def read_into(reader: S3StorageReader, metadata: Metadata, state: dict[str, Any], load_item: LoadItem) -> None:
    """Fill a state from :func:`allocate`.

    The steps are those of ``torch.distributed.checkpoint.load``, without what it does for other ranks; an error comes
    as it is, and not within a ``CheckpointException``.

    Args:
        reader: Has read ``metadata``.
        metadata: The checkpoint's.
        state: What is filled.
        load_item: Makes the value of an item that is no tensor, of its name and what was stored.

    Raises:
        MpreaderError: As for :func:`load_checkpoint`.
    """
    planner = _Planner(load_item)
    plan = plan_whole(metadata, state)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_global_plan([reader.prepare_local_plan(plan)])[0]
    reader.read_data(plan, planner).wait()


def nest(state: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """The state as it was saved: dictionaries in dictionaries, and lists.

    Raises:
        MetadataRefused: A path within the state can't be one.
    """
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    nested: dict[str, Any] = {}
    with _described(metadata):
        _check_paths([paths[fqn] for fqn in state if fqn in paths])
        for fqn, value in state.items():
            set_element(nested, paths.get(fqn, (fqn,)), value)
    return nested


def _check_paths(paths: list[Any]) -> None:
    """Refuse paths that would take memory without end, or lead backwards through a list."""
    lengths: dict[tuple[str | int, ...], int] = {}
    for path in paths:
        if not _is_path(path):
            raise ValueError(f"a path within the state is {path!r}")
        for depth, step in enumerate(path):
            if type(step) is int:
                lengths[path[:depth]] = max(lengths.get(path[:depth], 0), step + 1)
    if sum(lengths.values()) > sum(map(len, paths)) + _MOST_EMPTY_PLACES:
        raise ValueError("its lists have more places than items")


def _is_path(path: object) -> bool:
    if not isinstance(path, tuple) or not path or type(path[0]) is not str:
        return False
    return all(type(step) is str or (type(step) is int and step >= 0) for step in path)


class _Planner(DefaultLoadPlanner):
    def __init__(self, load_item: LoadItem) -> None:
        # The names are the metadata's own: torch must not make others.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._load_item = load_item

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        self.state_dict[fqn] = self._load_item(fqn, value)


def _empty(entry: object) -> torch.Tensor | None:
    if isinstance(entry, TensorStorageMetadata):
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    if isinstance(entry, BytesStorageMetadata):
        return None
    raise TypeError(f"an item is described by {type(entry).__name__}")


@contextlib.contextmanager
def _described(metadata: Metadata) -> Iterator[None]:
    """What .metadata says is another's: whatever fails because of it is one kind of error."""
    try:
        yield
    except MpreaderError:
        raise
    except Exception as error:
        raise MetadataRefused(
            f"the checkpoint's .metadata describes {len(metadata.state_dict_metadata)} items, but not so that they "
            f"could be loaded: {type(error).__name__}: {error}"
        ) from error


def _client_of(reader: S3StorageReader) -> S3Client:
    return cast("S3FileSystem", reader.fs).client


def _hint(client: S3Client, uri: str) -> str:
    """What there is where no checkpoint is, or begins with the same letters; "" where that can't be found out."""
    bucket, key = parse_s3_uri(uri)
    try:
        page = next(client.list_objects(bucket, key))
    except MpreaderError:
        return ""
    keys = [listed.key for listed in page.object_info]
    folder = key if not key or key.endswith("/") else f"{key}/"
    if key in keys and key != folder:
        return f"{uri} is a file: name the folder of the checkpoint, which holds .metadata"
    found = [f"s3://{bucket}/{name}".removesuffix("/.metadata") for name in keys if f"/{name}".endswith("/.metadata")]
    if found:
        return f"there are checkpoints at {', '.join(found[:_MOST_NAMED])}" + (", …" if found[_MOST_NAMED:] else "")
    if any(name.startswith(folder) for name in keys):
        return "there are files, but no .metadata: it was not saved to its end, or is no checkpoint of DCP"
    return "nothing is there"
