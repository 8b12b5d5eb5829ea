"""Targets of a timed load: what a checkpoint holds, read before any process is started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpreader.dcp.checkpoint import LoadOptions
from mpreader.dcp.loader import check_memory, read_metadata
from mpreader.dcp.state import empty_state, state_bytes

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
    with options.open_plain_reader(uri) as reader:
        planned = empty_state(read_metadata(reader), options.match)
        check_memory(bytes_needed(planned), reader, options.pool_config)
    return planned
