"""S3 by boto3: the only place that imports it. Credentials, signatures, regions and addressing never leave here."""

from __future__ import annotations

from mpreader.s3.client import S3Client
from mpreader.s3.objects import ListObjectsPage, ObjectInfo
from mpreader.s3.source import S3Source
from mpreader.s3.uri import parse_s3_uri
from mpreader.s3.writer import S3Writer

__all__ = ["ListObjectsPage", "ObjectInfo", "S3Client", "S3Source", "S3Writer", "parse_s3_uri"]
