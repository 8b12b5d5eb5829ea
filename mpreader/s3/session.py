"""boto3's clients of one process: one per region, made when needed.

A client costs some 0.1 s to make, so that equal settings share a session (``shared_session``).
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

import mpreader
from mpreader.collector import collector_paused
from mpreader.config import S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.pool.worker.route import Proxy
from mpreader.sources.network import proxy_for

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as BotoClient

__all__ = ["Session", "shared_session"]

# S3Writer's threads and the pool's (a HEAD per file of a checkpoint) at one time.
_MAX_CONNECTIONS: Final = 32
_CONNECT_TIMEOUT_S: Final = 10
_MAX_SHARED: Final = 8

_shared: dict[tuple[object, ...], Session] = {}
_shared_lock = threading.Lock()


def shared_session(config: S3ClientConfig) -> Session:
    """The process's session for these settings, as long as the environment and the credentials' files are the same."""
    key = (os.getpid(), config, _surroundings())
    with _shared_lock:
        session = _shared.pop(key, None)
        if session is None or session.is_without_credentials():  # they may have come since
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
        users: Who shares it.
    """

    def __init__(self, config: S3ClientConfig) -> None:
        self.pid = os.getpid()
        self.users = 0
        self._config = config
        self._lock = threading.Lock()
        self._core: botocore.session.Session | None = None
        self._boto: boto3.Session | None = None
        self._clients: dict[str | None, BotoClient] = {}
        self._bucket_regions: dict[str, str] = {}
        self._proxies: dict[str, Proxy | None] = {}
        self._ca_file = ""
        self._lacks_credentials = False

    def client_for(self, bucket: str) -> BotoClient:
        """The client that signs for the bucket's region, as far as that is known yet."""
        client = self._client(self._config.region)
        # boto3 follows a bucket to its region by itself, but would sign URLs for the region of the client.
        region = self._bucket_regions.get(bucket, client.meta.region_name)
        return client if region == client.meta.region_name else self._client(region)

    def where(self, bucket: str) -> str:
        """The service that is asked for a bucket, in words."""
        client = self._clients.get(self._config.region)
        region = self._bucket_regions.get(bucket) or (client.meta.region_name if client else self._config.region)
        endpoint = client.meta.endpoint_url if client else self._config.endpoint_url
        return f"region {region or 'unknown'}, endpoint {endpoint or 'unknown'}"

    def ca_file(self) -> str:
        """The file, or directory, of certificate authorities that botocore trusts."""
        if not self._ca_file:
            configured = self._botocore().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            self._ca_file = str(configured or get_cert_path(True))
        return self._ca_file

    def proxy_for(self, url: str) -> Proxy | None:
        """The proxy to the host of ``url``; asked of the environment once per host, as botocore does."""
        origin = "/".join(url.split("/", 3)[:3])
        if origin not in self._proxies:
            self._proxies[origin] = proxy_for(origin)
        return self._proxies[origin]

    def is_without_credentials(self) -> bool:
        """Whether a client was made while there was nothing to sign with."""
        return self._lacks_credentials

    def close(self) -> None:
        """Close all connections that are not in use; the next request opens new ones."""
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def release(self) -> None:
        """Be one user less; without any, connections are closed."""
        if self.pid != os.getpid():
            return
        with _shared_lock:
            self.users -= 1
            is_unused = not self.users
        if is_unused:
            self.close()

    def _client(self, region: str | None) -> BotoClient:
        client = self._clients.get(region)
        if client is None:
            with self._lock:
                client = self._clients.get(region)
                if client is None:
                    with collector_paused():
                        client = self._clients[region] = self._make_client(region)
        return client

    def _make_client(self, region: str | None) -> BotoClient:
        # One for all regions: they share the credentials, and the renewal of these.
        if self._boto is None:
            self._boto = boto3.Session(botocore_session=self._botocore())
            self._lacks_credentials = not self._config.unsigned and self._botocore().get_credentials() is None
        try:
            client: BotoClient = self._boto.client(
                "s3", region_name=region, endpoint_url=self._config.endpoint_url, config=_client_config(self._config)
            )
        except ValueError as error:  # how botocore says that an endpoint is no URL
            raise ConfigError(f"{error}; check endpoint_url, AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE") from error
        client.meta.events.register("before-parameter-build.s3", _presign_for_the_region)
        client.meta.events.register_first("choose-signer.s3", _presign_with_version_4)
        client.meta.events.register("after-call.s3", self._note_region)
        return client

    def _botocore(self) -> botocore.session.Session:
        if self._core is None:
            self._core = botocore.session.Session(profile=self._config.profile)
        return self._core

    def _note_region(self, http_response: Any, context: dict[str, Any], **_: object) -> None:
        """Remember the region for which a bucket took a signature."""
        bucket = context.get("s3_redirect", {}).get("bucket")
        region = context.get("signing", {}).get("region")
        if bucket and region and not bucket.startswith("arn:") and http_response.status_code < 300:
            self._bucket_regions[bucket] = region


def _client_config(config: S3ClientConfig) -> Config:
    options: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": config.max_attempts},
        "user_agent_extra": f"mpreader/{mpreader.__version__}",
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


def _surroundings() -> int:
    """What the credentials, the region and the way to the service depend on; a hash, so that no secret is kept."""
    names = sorted(
        name for name in os.environ if name.startswith(("AWS_", "REQUESTS_")) or name.lower().endswith("_proxy")
    )
    return hash((*((name, os.environ[name]) for name in names), *_file_versions()))


def _file_versions() -> Iterator[tuple[str, int, int]]:
    for name, usual in (("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), ("AWS_CONFIG_FILE", "~/.aws/config")):
        path = Path(os.environ.get(name, usual)).expanduser()
        try:
            status = path.stat()
        except OSError:
            continue
        yield str(path), status.st_mtime_ns, status.st_size
