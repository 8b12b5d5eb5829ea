"""Steps of a load in one process, without other ranks and without a state dictionary of the user.

They do the same as ``torch.distributed.checkpoint.load``, but the state is made from ``.metadata``::

    read_metadata ──> state.empty_state (no memory yet) ──> check_memory ──> state.allocate ──> read_into ──> state.nest

The loader of whole checkpoints runs all of these steps; the inspection and the timed loads of ``mpreader bench`` run
some of them. No step may communicate with other ranks.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, cast

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from mpreader.config import PoolConfig
from mpreader.dcp.state import plan_whole
from mpreader.errors import MpreaderError, ObjectMissing, PlanError
from mpreader.host import Host
from mpreader.pool.sizing import size_pool
from mpreader.s3 import BaseS3Client, parse_s3_uri

if TYPE_CHECKING:
    from mpreader.dcp.filesystem import S3FileSystem
    from mpreader.dcp.reader import S3StorageReader

__all__ = ["DroppingPlanner", "LoadItem", "check_memory", "read_into", "read_metadata"]

_MAX_CHECKPOINTS_NAMED: Final = 5  # in the text of an error

LoadItem = Callable[[str, io.BytesIO], Any]
"""Function that unpickles an item that is no tensor: takes its name and its stored bytes, returns its value."""


def read_metadata(reader: S3StorageReader) -> Metadata:
    """Read the ``.metadata`` of a checkpoint.

    Raises:
        ObjectMissing: There is no ``.metadata``; the error says what is found at the URI instead.
        MpreaderError: As for :meth:`S3StorageReader.read_metadata`.
    """
    reader.reset()  # as torch's load does: the reader notes which thread has begun the load
    try:
        return reader.read_metadata()
    except ObjectMissing as error:
        hint = _hint(_client_of(reader), str(reader.path))
        if not hint:
            raise
        raise ObjectMissing(
            f"{error}; {hint}", bucket=error.bucket, key=error.key, range=error.range, attempts=error.attempts
        ) from error.__cause__


def check_memory(needed: int, reader: S3StorageReader, pool_config: PoolConfig | None) -> None:
    """Refuse a load that needs more memory than is free: the kernel would kill the process in the middle of it.

    Args:
        needed: Bytes of the tensors that are to be loaded.
        reader: Storage reader of the load.
        pool_config: Settings of the pool of the load.

    Raises:
        PlanError: The tensors and the shared memory of the load take more memory than is free on the host and under
            the cgroup's limit.
    """
    host = Host.now()
    window = size_pool(pool_config or PoolConfig(), _client_of(reader).s3client_config, host).window_bytes
    if needed and needed + window > host.free_memory:
        raise PlanError(
            f"{reader.path}: its tensors take {needed} bytes, and up to {window} bytes of shared memory are used "
            f"to load them, but only {host.free_memory} bytes of memory are free here; select some of them "
            "(match=, --match)"
        )


def read_into(reader: S3StorageReader, metadata: Metadata, state: dict[str, Any], load_item: LoadItem) -> None:
    """Fill a state from :func:`allocate`.

    The steps are those of ``torch.distributed.checkpoint.load`` in a single rank. Errors are raised as they are, not
    within torch's ``CheckpointException``.

    Args:
        reader: The storage reader that has read ``metadata``.
        metadata: Metadata of the checkpoint.
        state: The state to fill. Its tensors are written to; the values of other items are set.
        load_item: Function that unpickles an item that is no tensor.

    Raises:
        MpreaderError: As for :func:`load_checkpoint`.
    """
    planner = _Planner(load_item)
    plan = plan_whole(metadata, state)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_global_plan([reader.prepare_local_plan(plan)])[0]
    reader.read_data(plan, planner).wait()


class DroppingPlanner(DefaultLoadPlanner):
    """Planner whose targets are the tensors of a state, flat as :func:`empty_state` makes it; drops all other items."""

    def __init__(self) -> None:
        # As in _Planner.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Drop an item that is no tensor: it was received and checked, but to unpickle it could run foreign code."""


class _Planner(DefaultLoadPlanner):
    """Planner whose targets are the tensors of a state; the values of other items are added to it."""

    def __init__(self, load_item: LoadItem) -> None:
        # The state is flat already, by the names of the metadata. torch must not flatten it and make other names.
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._load_item = load_item

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        self.state_dict[fqn] = self._load_item(fqn, value)


def _client_of(reader: S3StorageReader) -> BaseS3Client:
    # A cast, since torch's base class declares fs as torch's own file system.
    return cast("S3FileSystem", reader.fs).client


def _hint(client: BaseS3Client, uri: str) -> str:
    """Returns a sentence that says what exists under the URI, for the text of an error; "" if it can't be listed."""
    bucket, key = parse_s3_uri(uri)
    try:
        # One page, so one request, is enough to help. The key has no slash added: a neighbour whose name only begins
        # with the same letters is found, too.
        page = next(client.list_objects(bucket, key))
    except MpreaderError:
        return ""  # the user may not list; the error is raised without the sentence
    keys = [listed.key for listed in page.object_info]
    folder = key if not key or key.endswith("/") else f"{key}/"
    if key in keys and key != folder:
        return f"{uri} is a file: name the folder of the checkpoint, which holds .metadata"
    found = [f"s3://{bucket}/{name}".removesuffix("/.metadata") for name in keys if f"/{name}".endswith("/.metadata")]
    if found:
        more = ", …" if len(found) > _MAX_CHECKPOINTS_NAMED else ""
        return f"there are checkpoints at {', '.join(found[:_MAX_CHECKPOINTS_NAMED])}{more}"
    if any(name.startswith(folder) for name in keys):
        return "there are files, but no .metadata: it was not saved to its end, or is no checkpoint of DCP"
    return "nothing is there"
