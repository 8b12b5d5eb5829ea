"""Requester: the methods of an S3 client that streams and uploads call.

A protocol, so that their modules need not import :mod:`~mpreader.s3.client`, which imports the writer itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from mpreader.config import S3ClientConfig
from mpreader.s3.objects import ObjectInfo

__all__ = ["Requester"]


class Requester(Protocol):
    """Client that makes requests of S3; see :class:`mpreader.s3.client.BaseS3Client`. Thread-safe."""

    @property
    def s3client_config(self) -> S3ClientConfig:
        """Settings in force."""

    @property
    def unconditional_buckets(self) -> set[str]:
        """Buckets whose service refuses If-Match though the object is the right one; streams add to it."""

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        """Ask for an object's size and version."""

    def call(
        self, operation: str, bucket: str, *, range: tuple[int, int] | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Make a request by the name of boto3's method."""
