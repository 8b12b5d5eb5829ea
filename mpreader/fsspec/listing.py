"""Listings of S3 in the form of fsspec: describes objects as files, and derives folders from the slashes in keys.

It is used by :mod:`mpreader.fsspec.filesystem` only, and must not read objects. A path is ``bucket/key``, without a
slash at its end. Some programs mark an empty folder by an object whose key ends with a slash; such keys are listed as
folders, never as files.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpreader.errors import ConfigError, ObjectMissing
from mpreader.pool.source import ObjectVersion

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client, ObjectInfo

__all__ = ["FileInfo", "Info", "describe", "list_below", "list_folder", "version_of"]

Info = dict[str, Any]  # description of a file or folder; see describe()


def describe(client: BaseS3Client, path: str) -> Info:
    """Describe a file or, if there is no file of that name, a folder.

    Returns:
        ``name``, ``type`` (``"file"`` or ``"directory"``) and ``size`` in bytes; for a file also ``ETag``,
        ``LastModified`` (in UTC; None if the service does not say) and ``StorageClass``.

    Raises:
        ObjectMissing: There is neither a file nor a folder of that name.
        MpreaderError: S3 refuses, or can't be reached.
    """
    bucket, _, key = path.partition("/")
    if not key:
        if bucket:  # the empty path is the root, a folder that needs no request
            client.call("head_bucket", bucket)
        return _folder(path)
    try:
        return _file(bucket, client.head_object(bucket, key))
    except ObjectMissing:
        # S3 has no folders: one exists if any key begins with its name and a slash.
        page = next(client.list_objects(bucket, f"{key}/", max_keys=1))
        if not page.object_info:
            raise  # the error of the file
        return _folder(path)


def list_folder(client: BaseS3Client, path: str) -> list[Info]:
    """List the files and folders in a folder, sorted by name. For the path of a file, list that file.

    Raises:
        ObjectMissing: There is no such file or folder.
        ConfigError: ``path`` names no bucket.
        MpreaderError: S3 refuses, or can't be reached.
    """
    bucket, prefix = _prefix(path)
    infos: list[Info] = []
    is_folder = not prefix  # a bucket is a folder, even without objects
    # With the delimiter "/", S3 lists keys up to the next slash, and names the common prefixes behind it: the folders.
    for page in client.list_objects(bucket, prefix, "/"):
        # The marker of an empty folder is not listed below, but makes it a folder.
        is_folder |= bool(page.object_info or page.common_prefixes)
        infos += (_file(bucket, listed) for listed in page.object_info if not listed.key.endswith("/"))
        infos += (_folder(f"{bucket}/{name.removesuffix('/')}") for name in page.common_prefixes)
    if not is_folder:
        return [describe(client, path)]
    return sorted(infos, key=lambda info: str(info["name"]))


def list_below(client: BaseS3Client, path: str) -> Iterator[Info]:
    """Yield the files and folders below a folder, at any depth, and the folder itself; nothing if there is no folder.

    Raises:
        ConfigError: ``path`` names no bucket.
        MpreaderError: As for :func:`list_folder`.
    """
    bucket, prefix = _prefix(path)
    folders: set[str] = set()  # those that were yielded already
    for page in client.list_objects(bucket, prefix):
        for listed in page.object_info:
            name = f"{bucket}/{listed.key}"
            # Without a delimiter S3 lists only keys. Each slash from the end of the path onwards ends a folder's name.
            for end in (end for end, letter in enumerate(name) if letter == "/" and end >= len(path)):
                if name[:end] not in folders:
                    folders.add(name[:end])
                    yield _folder(name[:end])
            if not name.endswith("/"):
                yield _file(bucket, listed)


class FileInfo(dict[str, Any]):
    """Description of a file that also has its version: a HEAD tells more of that than a listing does.

    Attributes:
        version: The version.
    """

    def __init__(self, version: ObjectVersion, facts: Info) -> None:
        super().__init__(facts)
        self.version = version


def version_of(info: Info) -> ObjectVersion:
    """Version that a file's description tells; by its ETag if it is a copy of the description of :func:`describe`."""
    return info.version if isinstance(info, FileInfo) else ObjectVersion(info["size"], info["ETag"])


def _prefix(path: str) -> tuple[str, str]:
    """Return the bucket of a folder, and the prefix that all keys below the folder have."""
    bucket, _, key = path.partition("/")
    if not bucket:
        raise ConfigError("name a bucket: bucket/key; what buckets there are is not listed")
    return bucket, f"{key}/" if key else ""


def _folder(path: str) -> Info:
    return {"name": path, "size": 0, "type": "directory"}


def _file(bucket: str, found: ObjectInfo) -> Info:
    modified_s = found.last_modified
    facts = {
        "name": f"{bucket}/{found.key}",
        "size": found.size,
        "type": "file",
        "ETag": found.etag,
        "LastModified": datetime.datetime.fromtimestamp(modified_s, datetime.timezone.utc) if modified_s else None,
        "StorageClass": found.storage_class,
    }
    return FileInfo(found.version, facts)
