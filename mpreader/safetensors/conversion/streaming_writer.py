"""Storage writer of a save whose tensors exist only while each is written. The converter to DCP uses it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mpreader.dcp.writer import S3StorageWriter
from mpreader.errors import ConfigError, MpreaderError

if TYPE_CHECKING:
    from mpreader.config import S3ClientConfig
    from mpreader.dcp.filesystem import S3FileSystem

__all__ = ["StreamingWriter"]


class StreamingWriter(S3StorageWriter):
    """Storage writer that drops each tensor once it is written; torch's keeps those of a file until it is complete.

    Attributes:
        written: URIs of the objects that were written, or begun.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.written: list[str] = []

    @property
    def s3client_config(self) -> S3ClientConfig:
        """Settings of the client that writes, the region included."""
        return self._files.client.s3client_config

    def claim(self, *, overwrite: bool) -> None:
        """Refuse an existing checkpoint, or delete its ``.metadata``, which would soon describe files that are gone.

        Raises:
            ConfigError: There is a checkpoint, and ``overwrite`` is False.
        """
        uri = str(self._metadata_uri)
        if not self.fs.exists(uri):
            return
        if not overwrite:
            raise ConfigError(f"{self.path} has a checkpoint already; overwrite=True (--overwrite) replaces it")
        self.fs.rm_file(uri)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write all items to one file, each as soon as the planner has it."""
        name = f"{plan.storage_data.prefix}0.distcp"
        uri = str(self.fs.concat_path(self.path, name))
        results = []
        self.written.append(uri)  # first: an upload that is interrupted at its end may have made the object
        with self.fs.create_stream(uri, "wb") as stream:
            for item in plan.items:
                start = stream.tell()
                torch.save(planner.resolve_data(item), stream)  # type: ignore[arg-type]  # it only calls write
                nbytes = stream.tell() - start
                results.append(WriteResult(item.index, nbytes, _StorageInfo(name, start, nbytes)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        """Write ``.metadata``."""
        self.written.append(self._metadata_uri)
        super().finish(metadata, results)

    def discard(self) -> None:
        """Delete what was written, ``.metadata`` first."""
        for uri in [*reversed(self.written), f"{self._metadata_uri}.tmp"]:
            with contextlib.suppress(MpreaderError):  # the first error is already being raised
                self.fs.rm_file(uri)

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._files.close()

    @property
    def _files(self) -> S3FileSystem:
        return cast("S3FileSystem", self.fs)  # torch's base class declares it as its own

    @property
    def _metadata_uri(self) -> str:
        return str(self.fs.concat_path(self.path, ".metadata"))
