"""S3ReaderConstructor: makes the constructor of each kind of readers, by the names that users know.

The names are those of s3torchconnector. Importing this module imports neither the worker pool nor boto3: only
``multiprocess()`` does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mpreader.ranges import DEFAULT_MAX_GAP_SIZE
from mpreader.readers.constructor import DCPOptimizedConstructor, ItemRangeConstructor
from mpreader.readers.protocols import S3ReaderConstructorProtocol
from mpreader.readers.ranged import RangedS3Reader, check_buffer_size
from mpreader.readers.sequential import SequentialS3Reader

if TYPE_CHECKING:
    from mpreader.config import PoolConfig, S3ClientConfig
    from mpreader.readers.read_ahead import MultiprocessConstructor

__all__ = ["S3ReaderConstructor"]


class S3ReaderConstructor:
    """Kinds of readers, as constructors for ``reader_constructor=`` of the storage readers. All constructors pickle."""

    @staticmethod
    def sequential() -> S3ReaderConstructorProtocol:
        """One stream per object, of which everything is kept. For whole objects and any pattern of access."""
        return partial(SequentialS3Reader)

    @staticmethod
    def range_based(buffer_size: int | None = None) -> S3ReaderConstructorProtocol:
        """A ranged request per read, small reads buffered. For sparse reads of large objects.

        Args:
            buffer_size: Bytes that a small read fetches ahead. None: 8 MiB; 0: no buffer.

        Raises:
            TypeError: ``buffer_size`` is not a whole number.
            ValueError: ``buffer_size`` is negative.
        """
        check_buffer_size(buffer_size)
        return partial(RangedS3Reader, buffer_size=buffer_size)

    @staticmethod
    def dcp_optimized(max_gap_size: float = DEFAULT_MAX_GAP_SIZE) -> DCPOptimizedConstructor:
        """The items of a load plan, streamed one after the other in this process.

        Args:
            max_gap_size: Largest gap, in bytes, between two items of one stream. 0: a new stream after every gap;
                ``float("inf")``: one stream per file.

        Raises:
            TypeError: ``max_gap_size`` is not a number.
            ValueError: ``max_gap_size`` is negative.
        """
        return DCPOptimizedConstructor(max_gap_size)

    @staticmethod
    def multiprocess(
        max_gap_size: float = DEFAULT_MAX_GAP_SIZE,
        *,
        s3client_config: S3ClientConfig | None = None,
        pool_config: PoolConfig | None = None,
        progress: bool | None = None,
    ) -> MultiprocessConstructor:
        """The items of a load plan, read ahead by worker processes into shared memory.

        Args:
            max_gap_size: Largest gap, in bytes, between two items that are fetched as one.
            s3client_config: Settings of the S3 client. None: the storage reader's, or the defaults.
            pool_config: Settings of the worker pool. None: the defaults.
            progress: True shows a progress bar on stderr during a load, False shows none. None: on a terminal or in a
                notebook, and only in the first of several ranks.

        Raises:
            TypeError: ``max_gap_size`` is not a number.
            ValueError: ``max_gap_size`` is negative.
        """
        from mpreader.readers.read_ahead import MultiprocessConstructor

        return MultiprocessConstructor(
            max_gap_size, s3client_config=s3client_config, pool_config=pool_config, progress=progress
        )

    @staticmethod
    def default() -> S3ReaderConstructorProtocol:
        """The reader that works for any pattern of access: :meth:`sequential`."""
        return S3ReaderConstructor.sequential()

    @staticmethod
    def get_reader_type_string(constructor: S3ReaderConstructorProtocol | None) -> str:
        """Name the kind of readers that ``constructor`` makes.

        Args:
            constructor: A constructor. None: that of :meth:`default`.

        Returns:
            ``"sequential"``, ``"range_based"``, ``"dcp_optimized"`` or ``"multiprocess"``; ``"unknown"`` for
            constructors that were not made here.
        """
        if constructor is None:
            constructor = S3ReaderConstructor.default()
        if isinstance(constructor, ItemRangeConstructor):
            return constructor.reader_type
        made = constructor.func if isinstance(constructor, partial) else None
        if made is SequentialS3Reader:
            return "sequential"
        return "range_based" if made is RangedS3Reader else "unknown"
