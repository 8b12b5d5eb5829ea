"""Storage writer: saves checkpoints to S3 for ``torch.distributed.checkpoint``.

Users pass it to ``save``. torch's own writer, its base class, makes the contents of the files. This module gives them
the names that a prefix strategy chooses, uploads them while they are written, and must not let a save succeed if one of
torch's writing threads has failed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mpreader.dcp.filesystem import Path, S3FileSystem
from mpreader.dcp.prefix import DefaultPrefixStrategy, S3PrefixStrategyBase
from mpreader.errors import ConfigError, MpreaderError
from mpreader.readers.load_plan import is_inside

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
    from torch.distributed.checkpoint.storage import WriteResult
    from torch.futures import Future

    from mpreader.config import S3ClientConfig

__all__ = ["S3StorageWriter"]


@dataclasses.dataclass
class _Prefix:
    """Storage data of a rank's save plan; ``FileSystemWriter.write_data`` names the rank's files by it.

    Attributes:
        prefix: First part of the names, relative to the checkpoint.
    """

    prefix: str


class S3StorageWriter(FileSystemWriter):
    """Storage writer of a checkpoint on S3, for ``storage_writer=`` of ``torch.distributed.checkpoint.save``.

    Each file is uploaded while it is written, and appears when it is complete. ``.metadata`` is written last.

    Args:
        region: The bucket's region. None: the configuration's, or the environment's.
        path: ``s3://`` URI of the checkpoint.
        s3client_config: Settings of the S3 client.
        prefix_strategy: Chooser of the names of the ranks' files. None: ``DefaultPrefixStrategy()``.
        thread_count: Number of files that each rank writes at the same time.
        kwargs: Further arguments of torch's ``FileSystemWriter``, which depend on torch's version: ``overwrite``,
            ``_extensions``, ``single_file_per_rank``, for example.

    Raises:
        ValueError: ``path`` is not an ``s3://`` URI, or ``thread_count`` is not a whole number of at least 1.
    """

    def __init__(
        self,
        region: str | None,
        path: Path,
        s3client_config: S3ClientConfig | None = None,
        prefix_strategy: S3PrefixStrategyBase | None = None,
        thread_count: int = 1,
        **kwargs: Any,
    ) -> None:
        if not isinstance(thread_count, int) or thread_count < 1:
            raise ConfigError(f"thread_count must be a whole number of at least 1, got {thread_count!r}")
        # An upload has no local file that could be synced to a disk; S3 has stored it when it is complete.
        super().__init__(path=path, sync_files=False, thread_count=thread_count, **kwargs)
        # The base class has set both for its own file system, of another type.
        self.fs = S3FileSystem(region, s3client_config=s3client_config)  # type: ignore[assignment]
        self.path = self.fs.init_path(path)
        self.prefix_strategy = prefix_strategy or DefaultPrefixStrategy()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Give this rank its prefix, if the ranks save without a common plan."""
        plan = super().prepare_local_plan(plan)
        # Since torch 2.8 the base class knows its rank, and sets storage data if the ranks don't plan together. If they
        # do, prepare_global_plan gives all ranks their prefixes.
        rank = getattr(self, "rank", None)
        if plan.storage_data is None or rank is None:
            return plan
        return dataclasses.replace(plan, storage_data=self._prefix(rank))

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give every rank its prefix that has none yet; the index of a plan in ``plans`` is taken for its rank.

        Raises:
            ConfigError: The prefix strategy gives two ranks the same prefix, or one that leads out of the checkpoint.
        """
        # Ranks that save without a common plan call this each for itself: the plan's index is 0 there in every rank.
        prefixes = [plan.storage_data or self._prefix(rank) for rank, plan in enumerate(plans)]
        if len({prefix.prefix for prefix in prefixes}) < len(prefixes):
            raise ConfigError(
                f"{type(self.prefix_strategy).__name__} gives two ranks the same prefix; one would overwrite the other"
            )
        return [dataclasses.replace(plan, storage_data=prefix) for plan, prefix in zip(plans, prefixes, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files.

        Raises:
            MpreaderError: A writing thread has failed.
        """
        # torch only prints the exception of a writing thread, and would save .metadata without that thread's items. It
        # returns one result for each item that was written.
        written = super().write_data(plan, planner)
        missing = len(plan.items) - len(written.wait())
        if missing:
            raise MpreaderError(f"{missing} of {len(plan.items)} items were not saved; see the exception printed above")
        return written

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        """Returns True if ``checkpoint_id`` is an ``s3://`` URI."""
        return S3FileSystem.validate_checkpoint_id(checkpoint_id)

    def _prefix(self, rank: int) -> _Prefix:
        """Returns the prefix of a rank; refuses one whose files the storage reader would refuse."""
        prefix = self.prefix_strategy(rank)
        if not is_inside(f"{prefix}0.distcp"):
            raise ConfigError(
                f"{type(self.prefix_strategy).__name__} puts files of rank {rank} outside of the checkpoint: {prefix!r}"
            )
        return _Prefix(prefix)
