"""PyTorch Distributed Checkpoints on S3; the only part of mpreader that imports torch."""

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
from mpreader.dcp.writer import S3StorageWriter

__all__ = [
    "BinaryPrefixStrategy",
    "DefaultPrefixStrategy",
    "HexPrefixStrategy",
    "MetadataRefused",
    "NumericPrefixStrategy",
    "RoundRobinPrefixStrategy",
    "S3FileSystem",
    "S3PrefixStrategyBase",
    "S3StorageReader",
    "S3StorageWriter",
]
