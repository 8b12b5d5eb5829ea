"""Listings of S3 in the form of fsspec: describes objects as files, and derives folders from the slashes in keys.

It makes the requests for :mod:`mpreader.fsspec.listing_cache` and :mod:`mpreader.fsspec.description`, and must not read
objects. A path is ``bucket/key``, without a slash at its end. Some programs mark an empty folder by an object whose key
ends with a slash; such keys are listed as folders, never as files.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpreader.errors import ConfigError, ObjectMissing
from mpreader.pool.source import ObjectVersion

if TYPE_CHECKING:
    from mpreader.s3 import BaseS3Client, ObjectInfo

__all__ = ["FileInfo", "Info", "describe", "file_named", "folder", "list_below", "list_folder", "version_of"]

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
        return folder(path)
    try:
        return _file(bucket, client.head_object(bucket, key))
    except ObjectMissing:
        # S3 has no folders: one exists if any key begins with its name and a slash.
        if not any(page.object_info for page in client.list_objects(bucket, f"{key}/", max_keys=1)):
            raise  # the error of the file
        return folder(path)


def file_named(client: BaseS3Client, path: str) -> Info | None:
    """Describe a file by a listing, which is cheaper than a HEAD where there is none; None if there is no such file."""
    bucket, _, key = path.partition("/")
    # The key itself is the first of those that begin with it.
    for page in client.list_objects(bucket, key, max_keys=1):
        for listed in page.object_info:
            return _file(bucket, listed) if listed.key == key else None
    return None


def list_folder(client: BaseS3Client, path: str, begin: str = "") -> list[Info]:
    """List the files and folders in a folder. For the path of a file, list that file.

    A file that is also a folder is listed as both, in two descriptions.

    Args:
        client: Client of S3.
        path: The folder, or a bucket.
        begin: Beginning of the names to list; it has no slash. Where it is given, a folder that is not there is empty.

    Raises:
        ObjectMissing: There is no such file or folder.
        ConfigError: ``path`` names no bucket.
        MpreaderError: S3 refuses, or can't be reached.
    """
    bucket, prefix = _prefix(path)
    infos: list[Info] = []
    is_folder = not prefix or bool(begin)  # a bucket is a folder, even without objects
    prefixes = [prefix + begin]
    for each in prefixes:
        # With a delimiter, S3 lists keys up to the next slash, and names the common prefixes behind it: the folders.
        for page in client.list_objects(bucket, each, "/"):
            # The marker of an empty folder is not listed below, but makes it a folder.
            is_folder |= bool(page.object_info or page.common_prefixes)
            infos += (_file(bucket, listed) for listed in page.object_info if not listed.key.endswith("/"))
            for name in page.common_prefixes:
                # Two slashes in a key make a folder without a name, and no path can end in it: what is in it is listed
                # with what is in the folder around it.
                if f"/{name}".endswith("//"):
                    prefixes.append(name)
                else:
                    infos.append(folder(f"{bucket}/{name.removesuffix('/')}"))
    return infos if is_folder else [describe(client, path)]


def list_below(client: BaseS3Client, path: str, begin: str = "") -> Iterator[Info]:
    """Yield the files and folders below a folder, at any depth, and the folder itself; nothing if there is no folder.

    Args:
        client: Client of S3.
        path: The folder, or a bucket.
        begin: Beginning of the names to list, relative to the folder; it may have slashes.

    Raises:
        ConfigError: ``path`` names no bucket.
        MpreaderError: As for :func:`list_folder`.
    """
    bucket, prefix = _prefix(path)
    folders: set[str] = set()  # those that were yielded already
    for page in client.list_objects(bucket, prefix + begin):
        for listed in page.object_info:
            name = f"{bucket}/{listed.key}"
            # Without a delimiter S3 lists only keys. Each slash from the end of the path onwards ends a folder's name,
            # but not the second one of two slashes: see list_folder.
            for end in (end for end, letter in enumerate(name) if letter == "/" and end >= len(path)):
                if name[:end] not in folders and name[end - 1] != "/":
                    folders.add(name[:end])
                    yield folder(name[:end])
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


def folder(path: str) -> Info:
    """Describe a folder that is known to be there."""
    return {"name": path, "size": 0, "type": "directory"}


def _prefix(path: str) -> tuple[str, str]:
    """Return the bucket of a folder, and the prefix that all keys below the folder have."""
    bucket, _, key = path.partition("/")
    if not bucket:
        raise ConfigError("name a bucket: bucket/key; what buckets there are is not listed")
    return bucket, f"{key}/" if key else ""


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
