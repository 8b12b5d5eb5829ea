"""Steps of a load by one process that takes all of a checkpoint; nothing is shared out among the ranks of a job.

They do what ``torch.distributed.checkpoint.load`` does, without a state that the user has made::

    read_metadata ──> state.empty_state (no memory yet) ──> check_memory ──> state.allocate ──> read_into ──> state.nest

Loads of whole checkpoints, their description, and the timed loads of ``mpreader bench`` are made of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from mpreader.config import PoolConfig
from mpreader.dcp.state import plan_whole, state_bytes
from mpreader.errors import MpreaderError, ObjectMissing, PlanError
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.s3 import BaseS3Client, parse_s3_uri

if TYPE_CHECKING:
    from mpreader.dcp.filesystem import S3FileSystem
    from mpreader.dcp.reader import S3StorageReader

__all__ = ["LoadItem", "check_memory", "read_into", "read_metadata"]

_MOST_NAMED: Final = 5  # checkpoints, in an error

LoadItem = Callable[[str, io.BytesIO], Any]
"""Makes the value of an item that is no tensor, of its name and the bytes that were stored."""


def read_metadata(reader: S3StorageReader) -> Metadata:
    """Read the ``.metadata`` of a checkpoint; if there is none, the error says what is there instead.

    Raises:
        ObjectMissing: There is no checkpoint.
        MpreaderError: As for :meth:`S3StorageReader.read_metadata`.
    """
    reader.reset()
    try:
        return reader.read_metadata()
    except ObjectMissing as error:
        hint = _hint(_client_of(reader), str(reader.path))
        if not hint:
            raise
        raise ObjectMissing(
            f"{error}; {hint}", bucket=error.bucket, key=error.key, range=error.range, attempts=error.attempts
        ) from error.__cause__


def check_memory(state: Mapping[str, Any], reader: S3StorageReader, pool_config: PoolConfig | None) -> None:
    """Refuse to load a state that the host can't hold: the kernel would kill a process for it.

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


def read_into(reader: S3StorageReader, metadata: Metadata, state: dict[str, Any], load_item: LoadItem) -> None:
    """Fill a state from :func:`allocate`.

    The steps are those of ``torch.distributed.checkpoint.load``, without what it does for other ranks; an error comes
    as it is, and not within a ``CheckpointException``.

    Args:
        reader: Has read ``metadata``.
        metadata: The checkpoint's.
        state: The state to fill.
        load_item: Makes the value of an item that is no tensor.

    Raises:
        MpreaderError: As for :func:`load_checkpoint`.
    """
    planner = _Planner(load_item)
    plan = plan_whole(metadata, state)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_global_plan([reader.prepare_local_plan(plan)])[0]
    reader.read_data(plan, planner).wait()


class _Planner(DefaultLoadPlanner):
    """Planner whose targets are the tensors of a state; the values of other items are added to it."""

    def __init__(self, load_item: LoadItem) -> None:
        # The names are the metadata's own: torch must not make others.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._load_item = load_item

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        self.state_dict[fqn] = self._load_item(fqn, value)


def _client_of(reader: S3StorageReader) -> BaseS3Client:
    return cast("S3FileSystem", reader.fs).client


def _hint(client: BaseS3Client, uri: str) -> str:
    """Returns what there is at the URI, or begins with the same letters; "" if that can't be found out."""
    bucket, key = parse_s3_uri(uri)
    try:
        page = next(client.list_objects(bucket, key))  # one request: this is only to say more
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
