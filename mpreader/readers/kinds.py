"""S3ReaderConstructor: the public factory of reader constructors, with a method for each kind of reader.

The method names are those of s3torchconnector. This module must import neither the worker pool nor boto3,
which most kinds of readers don't need: ``multiprocess()`` imports them when it is called.
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
    from mpreader.readers.multiprocess_constructor import MultiprocessConstructor

__all__ = ["S3ReaderConstructor"]


class S3ReaderConstructor:
    """Factory of constructors for the argument ``reader_constructor`` of the storage readers.

    All constructors can be pickled.
    """

    @staticmethod
    def sequential() -> S3ReaderConstructorProtocol:
        """Readers with one stream per object, whose bytes are all kept. For whole objects and any pattern of access."""
        # A partial as in range_based(), because get_reader_type_string() recognises constructors by that.
        return partial(SequentialS3Reader)

    @staticmethod
    def range_based(buffer_size: int | None = None) -> S3ReaderConstructorProtocol:
        """Readers that make a ranged request for each read and buffer small reads. For sparse reads of large objects.

        Args:
            buffer_size: Bytes of the buffer that a small read fills. None: 8 MiB; 0: no buffer.

        Raises:
            TypeError: ``buffer_size`` is not a whole number.
            ValueError: ``buffer_size`` is negative.
        """
        check_buffer_size(buffer_size)  # now rather than when the first file is opened
        return partial(RangedS3Reader, buffer_size=buffer_size)

    @staticmethod
    def dcp_optimized(max_gap_size: float = DEFAULT_MAX_GAP_SIZE) -> DCPOptimizedConstructor:
        """Readers that stream the items of a load plan one after the other, in this process.

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
        """Readers whose bytes worker processes receive ahead of time, into shared memory. For load plans of DCP.

        Args:
            max_gap_size: Largest gap, in bytes, between two items that are fetched as one.
            s3client_config: Settings of the S3 client. None: those of mpreader's storage reader, or the defaults.
            pool_config: Settings of the worker pool. None: the defaults.
            progress: True shows a progress bar on stderr during a load, False shows none. None: on a terminal or in a
                notebook, and only in the first of several ranks.

        Raises:
            TypeError: ``max_gap_size`` is not a number.
            ValueError: ``max_gap_size`` is negative.
        """
        # Imported here, because it imports the worker pool, which the other kinds don't need.
        from mpreader.readers.multiprocess_constructor import MultiprocessConstructor

        return MultiprocessConstructor(
            max_gap_size, s3client_config=s3client_config, pool_config=pool_config, progress=progress
        )

    @staticmethod
    def default() -> S3ReaderConstructorProtocol:
        """Readers that work for any pattern of access: those of :meth:`sequential`."""
        return S3ReaderConstructor.sequential()

    @staticmethod
    def get_reader_type_string(constructor: S3ReaderConstructorProtocol | None) -> str:
        """Return the name of the kind of readers that ``constructor`` makes.

        Args:
            constructor: A constructor. None: the one of :meth:`default`.

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
