"""Options of other file systems: says what to use in place of s3fs's, which programs bring along.

An option that is not known must not be swallowed: the caller would read with other credentials, or from another server,
than he has named. Used by the file system's constructor only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["refuse_options"]

_CREDENTIALS: Final = (
    "credentials come from where boto3 looks for them (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, "
    "~/.aws/credentials, …), or from profile="
)
_CLIENT: Final = "use endpoint_url=, region=, profile=, or s3client_config=mpreader.S3ClientConfig(…)"
_OF_A_FILE: Final = "it is an option of the file: filesystem.open(path, block_size=…, cache_type=…, cache_options=…)"
_INSTEAD: Final = {
    **dict.fromkeys(("key", "secret", "token", "username", "password", "session"), _CREDENTIALS),
    **dict.fromkeys(("client_kwargs", "config_kwargs", "s3_additional_kwargs", "region_name"), _CLIENT),
    "use_ssl": 'use endpoint_url="https://…" or "http://…"',
    "requester_pays": "use s3client_config=mpreader.S3ClientConfig(requester_pays=True)",
    **dict.fromkeys(("block_size", "cache_type", "cache_options", "fill_cache"), _OF_A_FILE),
    **dict.fromkeys(("default_block_size", "default_cache_type", "default_fill_cache"), _OF_A_FILE),
    "max_concurrency": "use pool_config=mpreader.PoolConfig(workers=…, connections_per_worker=…), or batch_size=",
    "version_aware": "an open file always reads the version that existed when it was opened",
    "cache_regions": "a bucket's region is found by itself, and remembered",
}


def refuse_options(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse options that the file system does not have.

    Args:
        names: Names of the options that were given, and are not known.
        known: Names of those that are.

    Raises:
        TypeError: ``names`` is not empty.
    """
    for name in names:
        instead = _INSTEAD.get(name, f"there are {', '.join(known)}")
        raise TypeError(f"mpreader's file system got an unexpected keyword argument {name!r}: {instead}")
