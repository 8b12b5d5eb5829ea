"""PyTorch Distributed Checkpoints (DCP) on S3: storage reader and writer, and functions for whole checkpoints.

Users import its public names, listed below, from here. Besides it, only ``mpreader.formats`` may import torch.
"""

from mpreader.dcp.checkpoint import ItemRefused, load_checkpoint
from mpreader.dcp.conversion import dcp_to_torch_save
from mpreader.dcp.filesystem import S3FileSystem
from mpreader.dcp.huggingface import S3HuggingFaceStorageReader
from mpreader.dcp.inspection import describe_checkpoint
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
    RankSummary,
    ShardedLoadSummary,
    TensorSummary,
)
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
    "RankSummary",
    "RoundRobinPrefixStrategy",
    "S3FileSystem",
    "S3HuggingFaceStorageReader",
    "S3PrefixStrategyBase",
    "S3StorageReader",
    "S3StorageWriter",
    "ShardedLoadSummary",
    "TensorSummary",
    "dcp_to_torch_save",
    "describe_checkpoint",
    "load_checkpoint",
]
