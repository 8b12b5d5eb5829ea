"""Targets of a timed load: what a checkpoint holds, read before any process is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.loader import check_memory, read_metadata
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.state import empty_state, state_bytes
from mpreader.readers.kinds import S3ReaderConstructor

__all__ = ["planned_state"]


def planned_state(
    uri: str, options: LoadOptions, bytes_needed: Callable[[dict[str, Any]], int] = state_bytes
) -> dict[str, Any]:
    """Return the state of a checkpoint, whose tensors have no memory yet.

    Args:
        uri: ``s3://`` URI of the checkpoint.
        options: Options of the load.
        bytes_needed: Returns the bytes that the targets of such a state take.

    Raises:
        PlanError: The targets take more memory than is free.
        MpreaderError: As for :func:`mpreader.dcp.load_checkpoint`.
    """
    # By a reader that starts no processes: the first timed load shall start them, and a mistake is told of once.
    plain = S3ReaderConstructor.sequential()
    with S3StorageReader(
        options.region, uri, options.s3client_config, plain, allowed_globals=options.allowed_globals
    ) as reader:
        planned = empty_state(read_metadata(reader), options.match)
        check_memory(bytes_needed(planned), reader, options.pool_config)
    return planned
