"""Listings of S3 in fsspec's form: files, and the folders that the slashes in their names make.

Used by :mod:`mpreader.fsspec.filesystem` only. A path is ``bucket/key``, without a slash at its end. Keys that end with
a slash are how some programs mark an empty folder; they are listed as folders, never as files.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpreader.errors import ConfigError, ObjectMissing

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client, ObjectInfo

__all__ = ["Info", "describe", "list_below", "list_folder"]

Info = dict[str, Any]


def describe(client: BaseS3Client, path: str) -> Info:
    """Describe a file or, where there is none of that name, a folder.

    Returns:
        ``name``, ``type`` (``"file"`` or ``"directory"``) and ``size`` in bytes; of a file also ``ETag``,
        ``LastModified`` (in UTC; None where the service does not say) and ``StorageClass``.

    Raises:
        ObjectMissing: There is neither.
        MpreaderError: S3 refuses, or can't be asked.
    """
    bucket, _, key = path.partition("/")
    if not key:
        if bucket:
            client.call("head_bucket", bucket)
        return _folder(path)
    try:
        return _file(bucket, client.head_object(bucket, key))
    except ObjectMissing:
        # S3 knows no folders: one is there if a key begins with its name and a slash.
        page = next(client.list_objects(bucket, f"{key}/", max_keys=1))
        if not page.object_info:
            raise
        return _folder(path)


def list_folder(client: BaseS3Client, path: str) -> list[Info]:
    """List the files and folders in a folder, sorted by name; a file is all that is listed of itself.

    Raises:
        ObjectMissing: There is no such file or folder.
        ConfigError: No bucket is named.
        MpreaderError: S3 refuses, or can't be asked.
    """
    bucket, prefix = _prefix(path)
    infos: list[Info] = []
    is_folder = not prefix  # a bucket is a folder, even without objects
    for page in client.list_objects(bucket, prefix, "/"):
        is_folder |= bool(page.object_info or page.common_prefixes)
        infos += (_file(bucket, listed) for listed in page.object_info if not listed.key.endswith("/"))
        infos += (_folder(f"{bucket}/{name.removesuffix('/')}") for name in page.common_prefixes)
    if not is_folder:
        return [describe(client, path)]
    return sorted(infos, key=lambda info: str(info["name"]))


def list_below(client: BaseS3Client, path: str) -> Iterator[Info]:
    """List the files and folders below a folder, at any depth, the folder included; nothing where there is none.

    Raises:
        ConfigError: No bucket is named.
        MpreaderError: As for :func:`list_folder`.
    """
    bucket, prefix = _prefix(path)
    folders: set[str] = set()
    for page in client.list_objects(bucket, prefix):
        for listed in page.object_info:
            name = f"{bucket}/{listed.key}"
            # Each slash behind the path ends the name of a folder: the listing of S3 has only the keys.
            for end in (end for end, letter in enumerate(name) if letter == "/" and end >= len(path)):
                if name[:end] not in folders:
                    folders.add(name[:end])
                    yield _folder(name[:end])
            if not name.endswith("/"):
                yield _file(bucket, listed)


def _prefix(path: str) -> tuple[str, str]:
    """Return the bucket, and the prefix of the keys below a folder."""
    bucket, _, key = path.partition("/")
    if not bucket:
        raise ConfigError("name a bucket: bucket/key; what buckets there are is not listed")
    return bucket, f"{key}/" if key else ""


def _folder(path: str) -> Info:
    return {"name": path, "size": 0, "type": "directory"}


def _file(bucket: str, found: ObjectInfo) -> Info:
    modified_s = found.last_modified
    return {
        "name": f"{bucket}/{found.key}",
        "size": found.size,
        "type": "file",
        "ETag": found.etag,
        "LastModified": datetime.datetime.fromtimestamp(modified_s, datetime.timezone.utc) if modified_s else None,
        "StorageClass": found.storage_class,
    }
