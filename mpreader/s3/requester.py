"""Requester: the part of an S3 client that streams and uploads call, so that their modules need not import it."""

from __future__ import annotations

from typing import Any, Protocol

from mpreader.config import S3ClientConfig
from mpreader.s3.objects import ObjectInfo

__all__ = ["Requester"]


class Requester(Protocol):
    """Makes requests of S3; see :class:`mpreader.s3.client.BaseS3Client`. Thread-safe."""

    @property
    def s3client_config(self) -> S3ClientConfig:
        """Settings in force."""

    def head_object(self, bucket: str, key: str) -> ObjectInfo:
        """Ask for an object's size and version."""

    def call(
        self, operation: str, bucket: str, *, range: tuple[int, int] | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """Make a request by the name of boto3's method."""
