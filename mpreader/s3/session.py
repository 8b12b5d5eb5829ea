"""Session: boto3's clients for one set of settings, one client per region, made when they are needed.

A boto3 client takes some 0.1 s to make, so that all S3 clients of equal settings in a process share a session
(``shared_session``). The doctor's :class:`~mpreader.s3.account.Account` has one of its own. Credentials stay in here:
what leaves are responses and presigned URLs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.httpsession import get_cert_path

from mpreader.collector import collector_paused
from mpreader.config import S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.version import __version__

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as BotoClient

__all__ = ["Session", "shared_session"]

# S3Writer's threads and the pool's (a HEAD per file of a checkpoint) at one time.
_MAX_CONNECTIONS: Final = 32
_CONNECT_TIMEOUT_S: Final = 10
# Sessions are kept for later clients of the same settings. A program that changes them again and again, or its
# environment, must not collect clients and their connections for ever.
_MAX_SHARED: Final = 8
# By these botocore finds a bucket's region; the second comes before any other request to a directory bucket.
_REGION_REQUESTS: Final = ("HeadBucket", "CreateSession")

_shared: dict[tuple[object, ...], Session] = {}  # the one used last comes last
_shared_lock = threading.Lock()


def shared_session(config: S3ClientConfig) -> Session:
    """Return the process's session for these settings, counted as used once more; ``release`` gives it back.

    It is a new one where the environment or a file of credentials has changed since, and after a fork.
    """
    key = (os.getpid(), config, _environment_fingerprint())
    with _shared_lock:
        session = _shared.pop(key, None)
        # botocore looks for credentials once in a session's life, and those of a role may have come since.
        if session is None or session.is_without_credentials():
            session = Session(config)
        _shared[key] = session
        while len(_shared) > _MAX_SHARED:
            del _shared[next(iter(_shared))]
        session.users += 1
        return session


class Session:
    """One set of credentials and settings, with a client per region. Thread-safe; not usable after a fork.

    Attributes:
        pid: The process that it belongs to.
        users: Number of S3 clients that share it; guarded by the lock of all shared sessions.
    """

    def __init__(self, config: S3ClientConfig) -> None:
        self.pid = os.getpid()
        self.users = 0
        self._config = config
        self._lock = threading.Lock()  # held while a client is made, so that threads don't make the same one twice
        self._core: botocore.session.Session | None = None
        self._boto: boto3.Session | None = None
        self._clients: dict[str | None, BotoClient] = {}
        self._bucket_regions: dict[str, str] = {}
        self._ca_file = ""
        self._lacks_credentials = False

    @property
    def core(self) -> botocore.session.Session:
        """The botocore session that all clients are made from: they share its credentials, and their renewal."""
        if self._core is None:
            self._core = botocore.session.Session(profile=self._config.profile)
        return self._core

    def client_for(self, bucket: str) -> BotoClient:
        """Return the client that signs for the bucket's region, as far as that is known yet."""
        client = self._client(self._config.region)
        # boto3 follows a bucket to its region by itself, but would sign URLs for the region of the client.
        region = self._bucket_regions.get(bucket, client.meta.region_name)
        return client if region == client.meta.region_name else self._client(region)

    def make_client(self, region: str | None, options: Config | None = None) -> BotoClient:
        """Make a client that belongs to the caller alone.

        Args:
            region: AWS region. None: the environment's.
            options: Options of botocore in place of those that the settings lead to.

        Raises:
            ConfigError: The endpoint is no URL.
            BotoCoreError: The profile, the region or a file of the configuration is wrong.
        """
        config = _client_config(self._config)
        with collector_paused():
            if self._boto is None:
                self._boto = boto3.Session(botocore_session=self.core)
            try:
                client: BotoClient = self._boto.client(
                    "s3",
                    region_name=region,
                    endpoint_url=self._config.endpoint_url,
                    config=config.merge(options) if options is not None else config,
                )
            except ValueError as error:  # how botocore says that an endpoint is no URL
                raise ConfigError(f"{error}; check endpoint_url, AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE") from error
        client.meta.events.register("before-parameter-build.s3", _presign_for_the_region)
        client.meta.events.register_first("choose-signer.s3", _presign_with_version_4)
        for operation in _REGION_REQUESTS:
            client.meta.events.register_first(f"needs-retry.s3.{operation}", _ask_for_the_region_once)
        return client

    def where(self, bucket: str) -> str:
        """Return the region and endpoint that are asked for a bucket, in words for an error's message."""
        # Makes no client: an error in making one is among those whose message this is for.
        client = self._clients.get(self._config.region)
        region = self._bucket_regions.get(bucket) or (client.meta.region_name if client else self._config.region)
        endpoint = client.meta.endpoint_url if client else self._config.endpoint_url
        return f"region {region or 'unknown'}, endpoint {endpoint or 'unknown'}"

    def ca_file(self) -> str:
        """Return the file, or directory, of certificate authorities that botocore trusts."""
        if not self._ca_file:
            configured = self.core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            self._ca_file = str(configured or get_cert_path(True))
        return self._ca_file

    def is_without_credentials(self) -> bool:
        """Return True if there was nothing to sign with when a client was made."""
        return self._lacks_credentials

    def close(self) -> None:
        """Close all connections that are not in use; the next request opens new ones."""
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def release(self) -> None:
        """Count one user less; the last one closes the connections."""
        # A forked child's copy of a client is finalized there; the connections are still the parent's.
        if self.pid != os.getpid():
            return
        with _shared_lock:
            self.users -= 1
            is_unused = not self.users
        if is_unused:
            self.close()

    def _client(self, region: str | None) -> BotoClient:
        # Without the lock first: every request comes through here, from up to 16 threads at a time.
        client = self._clients.get(region)
        if client is None:
            with self._lock:
                client = self._clients.get(region)
                if client is None:
                    client = self._clients[region] = self._make_shared_client(region)
        return client

    def _make_shared_client(self, region: str | None) -> BotoClient:
        self._lacks_credentials = not self._config.unsigned and self.core.get_credentials() is None
        client = self.make_client(region)
        client.meta.events.register("after-call.s3", self._note_region)
        return client

    def _note_region(self, http_response: Any, context: dict[str, Any], **_: object) -> None:
        """Remember the region for which a bucket took a signature; called by botocore after each response."""
        # A redirect to the bucket's region has been followed by then, and the context is that of the last request.
        bucket = context.get("s3_redirect", {}).get("bucket")
        region = context.get("signing", {}).get("region")
        if bucket and region and not bucket.startswith("arn:") and http_response.status_code < 300:
            self._bucket_regions[bucket] = region


def _client_config(config: S3ClientConfig) -> Config:
    options: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": config.max_attempts},
        "user_agent_extra": f"mpreader/{__version__}",
        "max_pool_connections": _MAX_CONNECTIONS,
        "connect_timeout": _CONNECT_TIMEOUT_S,
    }
    if config.unsigned:
        options["signature_version"] = UNSIGNED
    if config.force_path_style:
        options["s3"] = {"addressing_style": "path"}
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        # Many S3-compatible services refuse the checksums that newer versions of boto3 add unasked.
        if name in Config.OPTION_DEFAULTS:
            options[name] = "when_required"
    return Config(**options)


def _presign_for_the_region(context: dict[str, Any], **_: object) -> None:
    """Presign for the region's endpoint; the global one redirects young buckets, and a worker can't follow."""
    context.pop("use_global_endpoint", None)


def _presign_with_version_4(signature_version: object, **_: object) -> Any:
    """Presign with SigV4, where boto3's default is SigV2.

    Not by ``Config(signature_version="s3v4")``: that would sign for directory buckets in the same way, and they need
    a session.
    """
    return "s3v4-query" if signature_version == "v4-query" else None


def _ask_for_the_region_once(response: Any, request_dict: dict[str, Any], **_: object) -> None:
    """Let botocore give up on a bucket whose region the service does not name.

    To a redirect without a region botocore reacts with a HEAD of the bucket, and to a redirect of that HEAD with
    another one, until Python's recursion limit ends it. It leaves a request alone that is marked as redirected.
    """
    if response is not None and "x-amz-bucket-region" not in response[1]["ResponseMetadata"]["HTTPHeaders"]:
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


def _environment_fingerprint() -> int:
    """Return a hash of all that decides credentials, region and the way to the service; a hash keeps no secret."""
    names = sorted(
        name for name in os.environ if name.startswith(("AWS_", "REQUESTS_")) or name.lower().endswith("_proxy")
    )
    return hash((*((name, os.environ[name]) for name in names), *_file_versions()))


def _file_versions() -> Iterator[tuple[str, int, int]]:
    """Yield path, time of modification and size of the files that hold credentials and configuration."""
    for name, usual in (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config")):
        path = Path(os.environ.get(name, usual)).expanduser()
        try:
            status = path.stat()
        except OSError:
            continue
        yield str(path), status.st_mtime_ns, status.st_size
