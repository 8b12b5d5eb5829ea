"""Account: examines the access to S3 with given settings: credentials, the service's response, rights to a bucket.

Used by ``mpreader doctor`` only, which runs the methods in threads of its own, and explains what they return or raise.
No result and no error of this module may hold a secret, not even the id of an access key.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from botocore import UNSIGNED, exceptions
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from mpreader.config import S3ClientConfig
from mpreader.errors import AccessDenied, ConfigError, PlanError
from mpreader.pool.worker.version import Validators, validators_of
from mpreader.s3.credentials import ProviderFailed
from mpreader.s3.failure import Target, translated
from mpreader.s3.identity import Identity, find_identity
from mpreader.s3.redaction import redacted
from mpreader.s3.session import Session
from mpreader.s3.signing import HeaderSigner

__all__ = ["Account", "NoResponse", "Readable", "ServiceResponse"]

_TIMEOUT_S: Final = 3  # of one request; the doctor also bounds the time of all of them together
_ONE_QUICK_ATTEMPT: Final[dict[str, Any]] = {
    "connect_timeout": _TIMEOUT_S,
    "read_timeout": _TIMEOUT_S,
    "retries": {"total_max_attempts": 1},
}
_Cause = Literal["tls", "proxy", "timeout", "connection"]


@dataclass(frozen=True, slots=True)
class ServiceResponse:
    """Facts of the service's response to a request without a signature. A refusal is a response, too.

    Attributes:
        status: HTTP status.
        seconds: Time of the request, including name look-up and connecting.
        skew: Time by which this host's clock is ahead of the service's; None where the response has no date.
        bucket_region: Region of the bucket; None where the response names none.
    """

    status: int
    seconds: float
    skew: timedelta | None
    bucket_region: str | None


@dataclass(frozen=True, slots=True)
class Readable:
    """Rights to a bucket that were tried successfully.

    Attributes:
        is_listed: True if the bucket may be listed.
        key: Key of an object that was read; None if no key begins with the prefix.
        refusals: Answers to the requests that the workers would make for that object, by the place of their signature,
            ``"query"`` or ``"headers"``; "" where it passes. Without signatures there is only the first.
        validators: What the service says of the version of that object; None if no byte of one was read.
    """

    is_listed: bool
    key: str | None
    refusals: Mapping[str, str] = field(default_factory=dict)
    validators: Validators | None = None


class NoResponse(Exception):
    """The service did not respond.

    Attributes:
        cause: Kind of failure, for which the doctor has a remedy each.
    """

    def __init__(self, cause: _Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Account:
    """Access to S3 with given settings, to be examined. Each method makes a few requests at most, without retries.

    The methods may run in several threads at a time.

    Args:
        config: Settings of S3.
        bucket: Bucket to examine. "": no bucket, only the service.

    Raises:
        ConfigError: A profile, region, URL or name is wrong.
    """

    def __init__(self, config: S3ClientConfig, bucket: str = "") -> None:
        self._config = config
        self._bucket = bucket
        self._secrets: tuple[str, ...] = ()  # the secrets found so far, which clean() removes
        # Not a shared session: that may have found its settings and credentials before the user corrected them.
        self._session = Session(config)
        # Unsigned, because finding the credentials may take long. It is left to identify(), which the doctor runs in a
        # thread.
        with contextlib.closing(self._make_client(config.region, signature_version=UNSIGNED)) as client:
            self.region: str = client.meta.region_name
            self._endpoint = self._url = str(client.meta.endpoint_url)
            if bucket:
                with translated(self._target()):
                    self._url = str(client.generate_presigned_url("head_bucket", Params={"Bucket": bucket}))

    @property
    def url(self) -> str:
        """URL of the bucket, or of the service, without a user name and password that an endpoint's URL may hold."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def identify(self) -> Identity:
        """Find the credentials, and fetch them if they are those of a role or another service.

        Raises:
            ConfigError: They can't be found or fetched; its message says why.
        """
        try:
            identity, self._secrets = find_identity(self._session.core)
        except Exception as error:  # noqa: BLE001  # of a provider, or of a file that botocore can't make sense of
            raise ConfigError(self.clean(str(error) or type(error).__name__)) from None
        return identity

    def probe(self) -> ServiceResponse:
        """Send one HEAD for the bucket, or for the service, without a signature.

        Raises:
            NoResponse: There was no response.
        """
        before = datetime.now(timezone.utc)
        response = self._send("HEAD", self._url, {})
        after = datetime.now(timezone.utc)
        return ServiceResponse(
            status=response.status_code,
            seconds=(after - before).total_seconds(),
            # The service wrote its date about halfway between sending and receiving.
            skew=_skew(before + (after - before) / 2, response.headers),
            bucket_region=response.headers.get("x-amz-bucket-region"),
        )

    def read(self, prefix: str) -> Readable:
        """List the objects whose keys begin with ``prefix``, and read a byte of one of them.

        Raises:
            ConfigError: A setting is wrong.
            TransportError: The service refused, or could not be reached.
        """
        with contextlib.closing(self._make_client(self._config.region)) as client:
            client.meta.events.register("after-call.s3", self._session.note_region)
            try:
                found = self._call(client.list_objects_v2, Prefix=prefix, MaxKeys=20).get("Contents", ())
            except AccessDenied:
                # Loading needs no right to list: it is no failure yet.
                key, validators = self._read_any(client, prefix)
                return Readable(False, key, self._read_as_workers(client, key), validators)
            if not found:
                return Readable(True, None)
            # The first object with content, if there is one: no byte of an empty object can be read.
            key = max(found, key=lambda entry: bool(entry.get("Size")))["Key"]
            validators = self._read_byte(client, key)
            return Readable(True, key, self._read_as_workers(client, key), validators)

    def clean(self, text: str) -> str:
        """Return ``text`` in one line and without secrets: user names and passwords of URLs, and credentials."""
        return redacted(text, self._secrets)

    def _read_any(self, client: Any, prefix: str) -> tuple[str, Validators | None]:
        """Read a byte without listing: of a checkpoint's ``.metadata``, or else of the object with this very key."""
        folder = prefix.rstrip("/")
        with contextlib.suppress(AccessDenied):
            validators = self._read_byte(client, f"{folder}/.metadata" if folder else ".metadata")
            return f"{folder}/.metadata".lstrip("/"), validators
        return prefix, self._read_byte(client, prefix or ".metadata")

    def _read_byte(self, client: Any, key: str) -> Validators | None:
        """Read a byte; returns what the service says of the version, None if the object is empty."""
        try:
            response = self._call(client.get_object, Key=key, Range="bytes=0-0")
        except PlanError:  # the object is empty, which shows that it may be read
            return None
        response["Body"].close()
        return validators_of(response["ResponseMetadata"]["HTTPHeaders"])

    def _read_as_workers(self, client: Any, key: str) -> dict[str, str]:
        """Try the requests that the workers make, without boto3, in each of the ways in which they may be signed."""
        payer = {"RequestPayer": "requester"} if self._config.requester_pays else {}
        parameters = {"Bucket": self._bucket, "Key": key, **payer}
        # boto3 itself may have followed the bucket to another region, but would sign a URL for its own.
        region = self._session.region_of(self._bucket) or client.meta.region_name
        with contextlib.closing(self._make_client(region)) as signing, translated(self._target(key)):
            url = signing.generate_presigned_url("get_object", Params=parameters)
            headers = {"x-amz-request-payer": "requester"} if payer else {}
            refusals = {"query": self._refusal(url, headers)}
            if not self._config.unsigned:
                signer = HeaderSigner()
                signer.watch(signing)
                url, signed = signer.sign(signing, **parameters)
                refusals["headers"] = self._refusal(url, dict(signed))
        return refusals

    def _refusal(self, url: str, headers: Mapping[str, str]) -> str:
        """Make a GET of one byte; returns what the service says against it, "" if it does not."""
        try:
            response = self._send("GET", url, {**headers, "Range": "bytes=0-0"})
        except NoResponse as error:
            return str(error)
        if response.status_code in (206, 416):  # the latter of an empty object
            return ""
        code, message = (re.search(rf"<{tag}>([^<]+)</{tag}>", response.text or "") for tag in ("Code", "Message"))
        location = response.headers.get("Location")
        details = [part[1] for part in (code, message) if part] + ([f"redirected to {location}"] if location else [])
        return self.clean(": ".join([f"HTTP {response.status_code}", *details]))

    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> Any:
        """Send a request without boto3, which would follow a redirect and turn a refusal into an error.

        Raises:
            NoResponse: There was no response.
        """
        trusted: Any = self._session.ca_file()  # Any: the type stubs of botocore don't allow a path
        http = URLLib3Session(verify=trusted, proxies=get_environ_proxies(url), timeout=_TIMEOUT_S)
        try:
            return http.send(AWSRequest(method, url, dict(headers)).prepare())
        except BotoCoreError as error:
            raise NoResponse(_cause(error), self.clean(_reason(error))) from None
        finally:
            http.close()

    def _call(self, method: Callable[..., dict[str, Any]], **parameters: Any) -> dict[str, Any]:
        payer = {"RequestPayer": "requester"} if self._config.requester_pays else {}
        with translated(self._target(parameters.get("Key", parameters.get("Prefix", "")))):
            return method(Bucket=self._bucket, **parameters, **payer)

    def _target(self, key: str = "") -> Target:
        return Target(self._bucket, key, lambda _: self.clean(f"region {self.region}, endpoint {self._endpoint}"), 1)

    def _make_client(self, region: str | None, **options: Any) -> Any:
        try:
            return self._session.make_client(region, Config(**_ONE_QUICK_ATTEMPT, **options))
        except (BotoCoreError, ProviderFailed, ConfigError) as error:
            raise ConfigError(self.clean(str(error))) from None  # the cause would show its text, secrets included


def _skew(now: datetime, headers: Mapping[str, str]) -> timedelta | None:
    try:
        theirs = parsedate_to_datetime(headers.get("Date", ""))
    except (TypeError, ValueError):  # there is no date, or it is malformed
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
    """Return the reason inside of botocore's error, whose own text says little more than the URL."""
    if isinstance(error, exceptions.ProxyConnectionError):
        return str(error)  # names the proxy, without its password, which the reason inside does not
    return str(error.kwargs.get("error") or error)
