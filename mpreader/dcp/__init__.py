"""PyTorch Distributed Checkpoints on S3; the only part of mpreader that imports torch."""

from mpreader.dcp.conversion import dcp_to_torch_save
from mpreader.dcp.filesystem import S3FileSystem
from mpreader.dcp.metadata import MetadataRefused
from mpreader.dcp.prefix import (
    BinaryPrefixStrategy,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    NumericPrefixStrategy,
    RoundRobinPrefixStrategy,
    S3PrefixStrategyBase,
)
from mpreader.dcp.reader import S3StorageReader
from mpreader.dcp.summary import (
    CheckpointSummary,
    FileRequests,
    FileSummary,
    ItemSummary,
    LoadSummary,
    TensorSummary,
    describe_checkpoint,
)
from mpreader.dcp.whole import ItemRefused, load_checkpoint
from mpreader.dcp.writer import S3StorageWriter

__all__ = [
    "BinaryPrefixStrategy",
    "CheckpointSummary",
    "DefaultPrefixStrategy",
    "FileRequests",
    "FileSummary",
    "HexPrefixStrategy",
    "ItemRefused",
    "ItemSummary",
    "LoadSummary",
    "MetadataRefused",
    "NumericPrefixStrategy",
    "RoundRobinPrefixStrategy",
    "S3FileSystem",
    "S3PrefixStrategyBase",
    "S3StorageReader",
    "S3StorageWriter",
    "TensorSummary",
    "dcp_to_torch_save",
    "describe_checkpoint",
    "load_checkpoint",
]
