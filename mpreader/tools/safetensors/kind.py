"""Kind of a checkpoint: whether a URI names one of DCP or safetensors files. It must work without torch."""

from __future__ import annotations

import os
from itertools import islice
from typing import Final

from mpreader.config import S3ClientConfig
from mpreader.errors import AccessDenied, ConfigError, MpreaderError, ObjectMissing
from mpreader.fetch.local import path_of
from mpreader.fetch.safetensors import INDEX, SUFFIX
from mpreader.readers.client import S3Client
from mpreader.s3 import parse_s3_uri

__all__ = ["has_files", "has_safetensors", "is_named_so"]

_METADATA: Final = ".metadata"
_MOST_LISTED: Final = 10_000  # objects; a bucket may have millions


def is_named_so(uri: str) -> bool:
    """True if a URI names safetensors files whatever is there: it ends so, or is no URI of S3, where DCP's are.

    Raises:
        ConfigError: A DCP checkpoint on a local disk.
    """
    if not uri.startswith(("s3://", "http://", "https://")):
        _refuse_local_dcp(path_of(uri))
    return not uri.startswith("s3://") or uri.endswith(SUFFIX)


def has_files(uri: str, s3client_config: S3ClientConfig | None) -> bool:
    """True if there are safetensors files in a directory on S3, or an index; False also if it can't be asked for.

    A directory with ``.metadata`` is to be taken for a DCP checkpoint, whatever else is in it.
    """
    bucket, folder = _folder(uri)
    client = S3Client(s3client_config=s3client_config)
    try:
        return _has_files(client, bucket, folder)
    except MpreaderError:  # such as that there is no bucket: whoever reads the checkpoint tells it better
        return False
    finally:
        client.close()


def has_safetensors(uri: str, s3client_config: S3ClientConfig | None) -> bool:
    """True if a URI names safetensors files; False if it names a checkpoint of DCP, or nothing.

    Args:
        uri: The URI; of a directory on S3, ``.metadata`` is asked for first.
        s3client_config: Settings of the S3 client.

    Raises:
        ConfigError: A DCP checkpoint on a local disk.
        TransportError: The service could not be reached, or failed.
    """
    if is_named_so(uri):
        return True
    bucket, folder = _folder(uri)
    client = S3Client(s3client_config=s3client_config)
    try:
        if _has_object(client, bucket, f"{folder}{_METADATA}"):
            return False
    finally:
        client.close()
    return has_files(uri, s3client_config)


def _refuse_local_dcp(path: str) -> None:
    if os.path.isfile(f"{path}/{_METADATA}"):
        raise ConfigError(
            f"{path} has .metadata, and so is a DCP checkpoint: mpreader loads those from s3:// only, torch's "
            "FileSystemReader loads this one"
        )


def _has_object(client: S3Client, bucket: str, key: str) -> bool:
    try:
        client.head_object(bucket, key)
    except (ObjectMissing, AccessDenied):  # S3 denies access to what is missing where listing is not allowed
        return False
    return True


def _has_files(client: S3Client, bucket: str, folder: str) -> bool:
    try:
        pages = client.list_objects(bucket, folder, "/")
        listed = islice((entry.key for page in pages for entry in page.object_info), _MOST_LISTED)
        return any(key.endswith((SUFFIX, INDEX)) for key in listed)
    except AccessDenied:
        return _has_object(client, bucket, f"{folder}{INDEX}")


def _folder(uri: str) -> tuple[str, str]:
    """Return the bucket, and the beginning of the keys of all that is in a directory."""
    bucket, key = parse_s3_uri(uri)
    return bucket, f"{key.rstrip('/')}/" if key else ""
