"""S3 by boto3: clients, credentials, signatures, regions, listings, streams and uploads.

The only package that imports boto3, apart from the servers for tests. It must know neither the worker pool nor the
readers: :mod:`mpreader.sources.s3` turns its presigned URLs into sources of the pool, and
:mod:`mpreader.readers.client` adds readers to its client.
"""

from __future__ import annotations

from mpreader.collector import collector_paused, spare_new_objects

# This imports boto3, whose 200 modules are objects that all stay. With torch loaded, the collections that they would
# cause take longer than the imports.
with collector_paused():
    from mpreader.s3.client import BaseS3Client, PresignedUrl
    from mpreader.s3.objects import ListObjectsPage, ObjectInfo
    from mpreader.s3.uri import parse_s3_uri
    from mpreader.s3.writer import S3Writer

    spare_new_objects()

__all__ = ["BaseS3Client", "ListObjectsPage", "ObjectInfo", "PresignedUrl", "S3Writer", "parse_s3_uri"]
