"""Session: boto3's clients for one set of settings, one client per region, made when they are needed.

A boto3 client takes some 0.05 s to make, so all :class:`~mpreader.s3.client.BaseS3Client` of equal settings share a
session (``shared_session``). The doctor's :class:`~mpreader.s3.account.Account` has one of its own. This module makes
no requests and translates no errors. It owns botocore's session, and with it the credentials.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Final

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError
from botocore.httpsession import get_cert_path

from mpreader.collector import collector_paused, spare_new_objects
from mpreader.config import S3ClientConfig
from mpreader.errors import ConfigError
from mpreader.s3.credentials import ProviderFailed, find_credentials, freeze, watch_providers
from mpreader.s3.environment import environment_fingerprint
from mpreader.s3.handlers import register_handlers
from mpreader.s3.models import ModelLoader
from mpreader.s3.redaction import redacted
from mpreader.s3.signing import HeaderSigner
from mpreader.version import __version__

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as BotoClient

__all__ = ["Session", "shared_session"]

# Enough for the threads of several S3Writers and for the pool's HEAD requests, one for each file of a checkpoint, at
# one time. With fewer, botocore would close connections and open new ones.
_MAX_CONNECTIONS: Final = 32
_CONNECT_TIMEOUT_S: Final = 10
# Sessions are kept for later clients of the same settings. Their number is bounded, because a program that changes its
# settings or its environment again and again would otherwise pile up clients and connections.
_MAX_SHARED: Final = 8

# The shared sessions by process, settings and environment. A dict keeps the order of insertion: the session used last
# comes last.
_shared: dict[tuple[object, ...], Session] = {}
# Guards _shared, and Session.users of all sessions. Reentrant: a garbage collection within it may drop a client, which
# releases its session.
_shared_lock = threading.RLock()
_watches_forks = False


def shared_session(config: S3ClientConfig) -> Session:
    """Return the process's session for these settings, and count one more user of it.

    It is a new session after a fork, and when the environment or a file of credentials has changed. The caller must
    call ``release`` once.
    """
    key = (os.getpid(), config, environment_fingerprint())
    _watch_forks()
    with _shared_lock:
        session = _shared.pop(key, None)
        # botocore looks for credentials only once in the life of its session. If it found none then, there may be some
        # now, such as those of a role: look again, with a new session.
        if session is None or session.is_without_credentials():
            session = Session(config)
        _shared[key] = session
        # The one unused for longest goes first. Clients that have it still go on with it, and close it at their end.
        while len(_shared) > _MAX_SHARED:
            del _shared[next(iter(_shared))]
        session.users += 1
        return session


def _watch_forks() -> None:
    # With the first session, not on import: whoever only imports this pays nothing at its forks.
    global _watches_forks
    if not _watches_forks:
        _watches_forks = True
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.RLock()  # a thread that is not here may have held the old one


class Session:
    """boto3's clients for one set of settings, one per region. Thread-safe; not usable after a fork.

    Args:
        config: Settings of S3.

    Attributes:
        pid: Id of the process that made it, and the only one that may use it.
        users: Number of S3 clients that share it; guarded by the lock of all shared sessions.
        header_signer: Signs requests of the clients of :meth:`client_for` in their headers.
    """

    def __init__(self, config: S3ClientConfig) -> None:
        self.pid = os.getpid()
        self.users = 0
        self._config = config
        self._lock = threading.Lock()  # held while a client is made, so that threads don't make the same one twice
        self._core: botocore.session.Session | None = None  # None until it is needed, like _boto and _ca_file
        self._boto: boto3.Session | None = None
        self._clients: dict[str | None, BotoClient] = {}  # by region; None: the environment's
        self._bucket_regions: dict[str, str] = {}  # by bucket, as far as responses have shown it
        self._header_buckets: set[str] = set()  # buckets that were found to refuse presigned URLs
        self.unconditional_buckets: set[str] = set()  # buckets that were found to refuse If-Match; streams add to it
        self.header_signer = HeaderSigner()
        self._ca_file = ""
        self._credentials: Credentials | None = None  # None until they are found
        self._lacks_credentials = False

    @property
    def core(self) -> botocore.session.Session:
        """The botocore session of all clients: they share its credentials, and renew them once for all."""
        if self._core is None:
            try:
                core = botocore.session.Session(profile=self._config.profile)
                core.register_component("data_loader", ModelLoader(core.get_component("data_loader")))
                watch_providers(core)
            except BotoCoreError:
                raise
            except Exception as error:  # such as a ValueError of a variable that should be a number
                raise ConfigError(_settings_error(error)) from error
            self._core = core  # last: a session without the watch must not be used
        return self._core

    def client_for(self, bucket: str) -> BotoClient:
        """Return the client that signs for the bucket's region, or for the settings' region until that is known.

        Its credentials are there, and renewed if that was due; without any, botocore's own error says so.

        Raises:
            ProviderFailed: The credentials could not be found or renewed.
            ConfigError: As for :meth:`make_client`.
            BotoCoreError: As for :meth:`make_client`.
        """
        self._ready_credentials()
        client = self._client(self._config.region)
        # For requests any client would do, since boto3 follows a redirect to the bucket's region. A presigned URL is
        # always signed for the client's own region, and a worker can't follow a redirect.
        region = self._bucket_regions.get(bucket, client.meta.region_name)
        return client if region == client.meta.region_name else self._client(region)

    def make_client(self, region: str | None, options: Config | None = None) -> BotoClient:
        """Make a client that belongs to the caller alone.

        Args:
            region: AWS region. None: the environment's.
            options: Options of botocore in place of those that the settings lead to.

        Raises:
            ConfigError: The endpoint is no URL, or boto3 can't make sense of a file of the configuration.
            BotoCoreError: The profile, the region or a file of the configuration is wrong.
            ProviderFailed: The credentials could not be found.
        """
        config = _client_config(self._config)
        # Making a client makes many objects that all stay: garbage collections would find nothing, and take longer than
        # the rest.
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
            except (BotoCoreError, ProviderFailed, MemoryError):
                raise
            # ValueError if the endpoint is not a URL; AttributeError, TypeError and others if a value of the
            # configuration file is of another kind than botocore takes for granted, as with "s3 = foo".
            except Exception as error:
                raise ConfigError(_settings_error(error)) from error
            spare_new_objects()
        register_handlers(client)
        return client

    def region_of(self, bucket: str) -> str | None:
        """Return the region whose signature the bucket has accepted; None until there was one."""
        return self._bucket_regions.get(bucket)

    def signs_in_headers(self, bucket: str) -> bool:
        """Return True if requests of the workers for this bucket are signed in their headers, not in their URL."""
        return self._config.signing == "headers" or bucket in self._header_buckets

    def remember_headers(self, bucket: str) -> None:
        """Note that a bucket refuses presigned URLs, for all later requests of the workers."""
        self._header_buckets.add(bucket)

    def where(self, bucket: str) -> str:
        """Return region and endpoint of the requests for a bucket, as text for an error's message."""
        # Must not make a client: making one may be what has failed, and this is the text of that error, too.
        client = self._clients.get(self._config.region)
        region = self._bucket_regions.get(bucket) or (client.meta.region_name if client else self._config.region)
        endpoint = client.meta.endpoint_url if client else self._config.endpoint_url
        return redacted(f"region {region or 'unknown'}, endpoint {endpoint or 'unknown'}")  # a URL may hold a password

    def ca_file(self) -> str:
        """Return the file, or directory, of certificate authorities that botocore trusts."""
        # The same order as in botocore: setting ca_bundle or AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE, the bundled file. So
        # the workers trust the same authorities as boto3's own requests.
        if not self._ca_file:
            configured = self.core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            self._ca_file = str(configured or get_cert_path(True))
        return self._ca_file

    def is_without_credentials(self) -> bool:
        """Return True if no credentials were found when a client was made."""
        return self._lacks_credentials

    def close(self) -> None:
        """Close all connections that are not in use; the next request opens new ones."""
        with self._lock:
            clients = list(self._clients.values())  # a copy, since other threads may add clients meanwhile
        for client in clients:
            client.close()

    def release(self) -> None:
        """Count one user less; when there is none left, close the connections."""
        # In a forked child the copies of the parent's clients are finalized, too. The connections are still the
        # parent's.
        if self.pid != os.getpid():
            return
        with _shared_lock:
            self.users -= 1
            is_unused = not self.users
        if is_unused:  # after the lock, since closing may take time; a new user in between only connects again
            self.close()

    def _client(self, region: str | None) -> BotoClient:
        # Looked up without the lock first: every request comes through here, from up to 16 threads at a time.
        client = self._clients.get(region)
        if client is None:
            with self._lock:
                client = self._clients.get(region)
                if client is None:
                    client = self._clients[region] = self._make_shared_client(region)
        return client

    def _ready_credentials(self) -> None:
        """Find the credentials, once, and renew them where that is due: here, where a failure is known to be theirs."""
        if self._config.unsigned or self._lacks_credentials:
            return
        if self._credentials is None:
            with self._lock:  # else many threads would ask a role's service at the same time
                self._credentials = self._credentials or find_credentials(self.core)
                self._lacks_credentials = self._credentials is None
        if self._credentials is not None:
            freeze(self._credentials)

    def _make_shared_client(self, region: str | None) -> BotoClient:
        client = self.make_client(region)
        client.meta.events.register("after-call.s3", self.note_region)
        self.header_signer.watch(client)
        return client

    def note_region(self, http_response: Any, context: dict[str, Any], **_: object) -> None:
        """Remember the region whose signature a bucket accepted; called by botocore after each response."""
        # botocore has followed a redirect to the bucket's region by then: the context is that of the last request. An
        # ARN of an access point is left out, since it names its region itself.
        bucket = context.get("s3_redirect", {}).get("bucket")
        region = context.get("signing", {}).get("region")
        if bucket and region and not bucket.startswith("arn:") and http_response.status_code < 300:
            self._bucket_regions[bucket] = region


def _settings_error(error: Exception) -> str:
    text = redacted(str(error))
    if isinstance(error, (ValueError, OSError)):
        return f"{text}; check endpoint_url, AWS_ENDPOINT_URL_S3 and AWS_CA_BUNDLE"
    file = os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")
    return f"boto3 can't use its configuration ({type(error).__name__}: {text}); check {file} and the variables AWS_*"


def _client_config(config: S3ClientConfig) -> Config:
    """Translate the settings into botocore's options."""
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
        # Newer versions of boto3 add checksums to every request by default, which many S3-compatible services refuse.
        # Older versions don't have these options.
        if name in Config.OPTION_DEFAULTS:
            options[name] = "when_required"
    return Config(**options)
