"""Environment of S3: a fingerprint of the variables and files that boto3 takes its settings from.

Used by :mod:`~mpreader.s3.session`, to see that they have changed since a session was made of them. It reads no file,
and returns no value of the environment, which may be a secret.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["environment_fingerprint"]


def environment_fingerprint() -> int:
    """Return a hash of everything in environment and files that decides credentials, region, endpoint and proxies.

    A hash, since the values hold secrets, and the keys of the shared sessions are kept.
    """
    names = sorted(
        name for name in os.environ if name.startswith(("AWS_", "REQUESTS_")) or name.lower().endswith("_proxy")
    )
    return hash((*((name, os.environ[name]) for name in names), *_file_versions()))


def _file_versions() -> Iterator[tuple[str, int, int]]:
    """Yield path, time of modification and size of the files that hold credentials and configuration.

    Any change of a file changes one of these, and the file need not be read.
    """
    for name, usual in (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config")):
        # Not Path.expanduser(), which raises where HOME is unset and the user has no entry in /etc/passwd. This leaves
        # the name as it is then, as botocore does, and there is no such file.
        path = Path(os.path.expanduser(os.environ.get(name, usual)))
        try:
            status = path.stat()
        except OSError:
            continue
        yield str(path), status.st_mtime_ns, status.st_size
