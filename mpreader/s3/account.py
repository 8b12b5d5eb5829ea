"""Account: S3 as given settings lead to it, namely the credentials, the service's response, the rights to a bucket.

For ``mpreader doctor`` alone, which runs the methods in threads and explains what they return or raise. Nothing that
leaves here holds a secret, not even the id of an access key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from botocore import UNSIGNED, exceptions
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import BotoCoreError, ClientError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies, parse_timestamp

from mpreader.config import S3ClientConfig
from mpreader.errors import AccessDenied, ConfigError, PlanError
from mpreader.s3.failure import Target, translated
from mpreader.s3.session import Session

__all__ = ["Account", "Identity", "NoResponse", "Readable", "ServiceResponse", "code_of"]

# Of one request; the doctor bounds the time of all of them together.
_TIMEOUT_S: Final = 3
_ONE_QUICK_ATTEMPT: Final[dict[str, Any]] = {
    "connect_timeout": _TIMEOUT_S,
    "read_timeout": _TIMEOUT_S,
    "retries": {"total_max_attempts": 1},
}
# Sources of credentials that stay as they are. From all others botocore fetches new ones before they expire.
_UNRENEWED: Final = ("env", "shared-credentials-file", "config-file")
# Shorter ones are those of test servers, such as "test": a message that must be shown may hold such a word.
_MIN_SECRET_LENGTH: Final = 8

_Cause = Literal["tls", "proxy", "timeout", "connection"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Facts of the credentials that are found.

    Attributes:
        source: Place they come from, in botocore's words, such as ``"env"``; "" if there are none.
        profile: Profile in force.
        expires: Moment they expire, in UTC; None: never, or it is not known.
        is_renewed: True if botocore fetches new ones by itself before that.
        lacks_token: True if they are temporary ones without their session token.
    """

    source: str
    profile: str
    expires: datetime | None = None
    is_renewed: bool = False
    lacks_token: bool = False


@dataclass(frozen=True, slots=True)
class ServiceResponse:
    """Facts of the service's response to a request without a signature; a refusal is a response, too.

    Attributes:
        status: HTTP status.
        seconds: Time it took, look-up of the name and connection included.
        skew: Time by which our clock is ahead of the service's; None where the response has no date.
        bucket_region: Region of the bucket; None where the response names none.
    """

    status: int
    seconds: float
    skew: timedelta | None
    bucket_region: str | None


@dataclass(frozen=True, slots=True)
class Readable:
    """Rights to a bucket, as far as they were tried.

    Attributes:
        is_listed: True if it may be listed.
        key: Key of an object that was read; None: there is none below the prefix.
    """

    is_listed: bool
    key: str | None


class NoResponse(Exception):
    """The service did not respond.

    Attributes:
        cause: Kind of obstacle.
    """

    def __init__(self, cause: _Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Account:
    """Access to S3 with given settings, to be examined. Each method makes one request or a few, without retries.

    Args:
        config: Settings of S3.
        bucket: Bucket to examine. "": the service itself.

    Raises:
        ConfigError: A profile, region, URL or name is wrong.
    """

    def __init__(self, config: S3ClientConfig, bucket: str = "") -> None:
        self._config = config
        self._bucket = bucket
        self._secrets: tuple[str, ...] = ()  # those that were found so far, for clean()
        # Not a shared one: it may have been made before what is wrong was changed.
        self._session = Session(config)
        # Unsigned: finding credentials may take long, and is left to identify(), which the doctor runs in a thread.
        with contextlib.closing(self._make_client(signature_version=UNSIGNED)) as client:
            self.region: str = client.meta.region_name
            self._endpoint = self._url = str(client.meta.endpoint_url)
            if bucket:
                with translated(self._target()):
                    self._url = str(client.generate_presigned_url("head_bucket", Params={"Bucket": bucket}))

    @property
    def url(self) -> str:
        """URL of the bucket, or of the service, without the secrets that an endpoint's URL may hold."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def identify(self) -> Identity:
        """Find the credentials, and fetch them where they must be fetched.

        Raises:
            ConfigError: They can't be had; it says why.
        """
        try:
            return self._identify()
        except (BotoCoreError, ClientError, ValueError) as error:
            raise ConfigError(self.clean(str(error))) from None

    def probe(self) -> ServiceResponse:
        """Ask the service for the bucket, once and without a signature.

        Raises:
            NoResponse: There was none.
        """
        # Not by a client: it would sign the request, follow a redirect, and turn a refusal into an error.
        trusted: Any = self._session.ca_file()  # the stubs know no file
        http = URLLib3Session(verify=trusted, proxies=get_environ_proxies(self._url), timeout=_TIMEOUT_S)
        before = datetime.now(timezone.utc)
        try:
            response = http.send(AWSRequest("HEAD", self._url).prepare())
        except BotoCoreError as error:
            raise NoResponse(_cause(error), self.clean(_reason(error))) from None
        finally:
            http.close()
        after = datetime.now(timezone.utc)
        return ServiceResponse(
            status=response.status_code,
            seconds=(after - before).total_seconds(),
            # The service read its clock about halfway between.
            skew=_skew(before + (after - before) / 2, response.headers),
            bucket_region=response.headers.get("x-amz-bucket-region"),
        )

    def read(self, prefix: str) -> Readable:
        """List the objects whose keys begin with ``prefix``, and read a byte of one of them.

        Raises:
            ConfigError: A setting is wrong.
            TransportError: It is refused, or does not work.
        """
        with contextlib.closing(self._make_client()) as client:
            try:
                found = self._call(client.list_objects_v2, Prefix=prefix, MaxKeys=20).get("Contents", ())
            except AccessDenied:
                return Readable(False, self._read_any(client, prefix))
            if not found:
                return Readable(True, None)
            # One with content, if there is any: of an empty object no byte can be read.
            key: str = max(found, key=lambda entry: bool(entry["Size"]))["Key"]
            self._read_byte(client, key)
            return Readable(True, key)

    def clean(self, text: str) -> str:
        """Return ``text`` in one line, without anything in it that is secret."""
        text = re.sub(r"//\S*@", "//", " ".join(text.split()))
        # The representation of an object, with which urllib3 begins its reasons.
        text = re.sub(r"<urllib3\S* object at \w+>: |\w+Connection\([^)]*\): ", "", text)
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return text

    def _identify(self) -> Identity:
        profile = self._session.core.get_config_variable("profile") or "default"
        settings = self._session.core.get_scoped_config()
        if "mfa_serial" in settings and "role_arn" in settings:
            # Botocore would ask for the code on the terminal, and wait.
            raise ConfigError(f"the profile {profile} asks for an MFA code each time, which a job can't give")
        credentials = self._session.core.get_credentials()
        if credentials is None:
            return Identity("", profile)
        key, token = self._fetch(credentials)
        expires = getattr(credentials, "_expiry_time", None)  # botocore has no public name for it
        return Identity(
            source=credentials.method,
            profile=profile,
            expires=expires or _noted_expiry(credentials.method, settings),
            is_renewed=credentials.method not in _UNRENEWED,
            lacks_token=key.startswith("ASIA") and not token,
        )

    def _fetch(self, credentials: Credentials) -> tuple[str, str]:
        """Return the id of the access key and the session token; "" where they have expired."""
        try:
            frozen = credentials.get_frozen_credentials()
        except RuntimeError:  # how botocore says that what it has fetched has expired
            return "", ""
        key, token = frozen.access_key or "", frozen.token or ""
        secrets = (frozen.secret_key or "", token, key)
        self._secrets = tuple(secret for secret in secrets if len(secret) >= _MIN_SECRET_LENGTH)
        return key, token

    def _read_any(self, client: Any, prefix: str) -> str:
        """Read as a loader that may not list would: the object of this name, or a checkpoint's metadata."""
        folder = prefix.rstrip("/")
        with contextlib.suppress(AccessDenied):
            self._read_byte(client, f"{folder}/.metadata" if folder else ".metadata")
            return f"{folder}/.metadata".lstrip("/")
        self._read_byte(client, prefix or ".metadata")
        return prefix

    def _read_byte(self, client: Any, key: str) -> None:
        with contextlib.suppress(PlanError):  # the object is empty
            self._call(client.get_object, Key=key, Range="bytes=0-0")["Body"].close()

    def _call(self, method: Callable[..., dict[str, Any]], **parameters: Any) -> dict[str, Any]:
        payer = {"RequestPayer": "requester"} if self._config.requester_pays else {}
        with translated(self._target(parameters.get("Key", parameters.get("Prefix", "")))):
            return method(Bucket=self._bucket, **parameters, **payer)

    def _target(self, key: str = "") -> Target:
        return Target(self._bucket, key, lambda _: self.clean(f"region {self.region}, endpoint {self._endpoint}"), 1)

    def _make_client(self, **options: Any) -> Any:
        try:
            return self._session.make_client(self._config.region, Config(**_ONE_QUICK_ATTEMPT, **options))
        except (BotoCoreError, ConfigError) as error:
            raise ConfigError(self.clean(str(error))) from None  # the cause's text may name what is secret


def code_of(error: BaseException) -> str:
    """Return S3's own code for a refusal, such as ``"AccessDenied"``; "" where it gave none."""
    refusal = error.__cause__
    return str(refusal.response.get("Error", {}).get("Code", "")) if isinstance(refusal, ClientError) else ""


def _noted_expiry(source: str, settings: Mapping[str, object]) -> datetime | None:
    """Return the moment credentials expire, as the tools that wrote them into the file have noted it there."""
    if source not in _UNRENEWED[1:]:
        return None
    for name, value in settings.items():
        if "expir" in name.lower() and isinstance(value, str):
            with contextlib.suppress(ValueError, RuntimeError):
                expires: datetime = parse_timestamp(value)
                return expires if expires.tzinfo else expires.replace(tzinfo=timezone.utc)
    return None


def _skew(now: datetime, headers: Mapping[str, str]) -> timedelta | None:
    try:
        theirs = parsedate_to_datetime(headers.get("Date", ""))
    except (TypeError, ValueError):
        return None
    return now - (theirs if theirs.tzinfo else theirs.replace(tzinfo=timezone.utc))


def _cause(error: BotoCoreError) -> _Cause:
    if isinstance(error, exceptions.SSLError):
        return "tls"
    if isinstance(error, exceptions.ProxyConnectionError):
        return "proxy"
    if isinstance(error, (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError)):
        return "timeout"
    return "connection"


def _reason(error: BotoCoreError) -> str:
    """Return the reason that botocore's error hides: its own text says little more than the URL."""
    if isinstance(error, exceptions.ProxyConnectionError):
        return str(error)  # names the proxy, without its password
    return str(error.kwargs.get("error") or error)
