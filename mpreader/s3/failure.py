"""Translation of botocore's errors, the only one: each becomes an error of mpreader's that says what to do.

Used around every request that this package makes. Streams that break are not its business: :mod:`mpreader.s3.stream`
resumes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError

from mpreader.errors import (
    AccessDenied,
    ConfigError,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PlanError,
    TransportError,
)

__all__ = ["Target", "translated"]


class Target(NamedTuple):
    """Subject of a request, for the error that may come of it.

    Attributes:
        bucket: The bucket.
        key: The key, or "".
        where: Returns, in words, the service that is asked for a bucket.
        max_attempts: Requests that boto3 makes before it gives up.
        range: Bytes that were asked for, end exclusive; None: no range.
    """

    bucket: str
    key: str
    where: Callable[[str], str]
    max_attempts: int
    range: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def error(self, kind: type[TransportError], message: str, attempts: int) -> TransportError:
        """Make an error about it."""
        text = f"{self}: {message} [{self.where(self.bucket)}]"
        return kind(text, bucket=self.bucket, key=self.key, range=self.range, attempts=attempts)


_GIVE_CREDENTIALS: Final = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE / S3ClientConfig(profile=…), run `aws configure` "
    "or `aws sso login`, give the machine a role, or set S3ClientConfig(unsigned=True) for a public bucket"
)
_DENIED: Final = (
    "access denied: check that the credentials may use this bucket and key (S3 answers the same for a missing key "
    "where s3:ListBucket is not allowed; a requester-pays bucket needs requester_pays=True)"
)
_WRONG_REGION: Final = (
    "the bucket lies in another region, and could not be followed there: set S3ClientConfig(region=…)"
)

_NO_REGION: Final = (
    "the service redirects the request, perhaps to another region, but names none: check endpoint_url, and "
    "S3ClientConfig(region=…)"
)
# Also those of a web server that sends plain http to https, say: botocore follows none but to another region.
_REDIRECTS: Final = frozenset({301, 302, 307, 308})

_BY_CODE: Final[dict[str, tuple[type[TransportError], str]]] = {
    "NoSuchBucket": (ObjectMissing, "there is no such bucket"),
    "NoSuchKey": (ObjectMissing, "the bucket exists, but has no such key"),
    "NoSuchVersion": (ObjectMissing, "the bucket exists, but has no such version of the key"),
    "NoSuchUpload": (ObjectMissing, "the multipart upload is gone; something else aborted it"),
    "PreconditionFailed": (ObjectChanged, "the object was overwritten while it was read; start again"),
    "InvalidObjectState": (AccessDenied, "the object is archived; restore it first"),
    "ExpiredToken": (AccessDenied, "the session token has expired; renew the credentials"),
    "ExpiredTokenException": (AccessDenied, "the session token has expired; renew the credentials"),
    "InvalidToken": (AccessDenied, "the session token is wrong; check AWS_SESSION_TOKEN"),
    "InvalidAccessKeyId": (AccessDenied, f"the access key is unknown there; {_GIVE_CREDENTIALS}"),
    "SignatureDoesNotMatch": (AccessDenied, "the secret key is not that of the access key; check the credentials"),
    "RequestTimeTooSkewed": (AccessDenied, "this machine's clock is wrong; set it"),
    "PermanentRedirect": (TransportError, _WRONG_REGION),
    "AuthorizationHeaderMalformed": (TransportError, _WRONG_REGION),
    "IllegalLocationConstraintException": (TransportError, _WRONG_REGION),
}
_BY_STATUS: Final[dict[int, tuple[type[TransportError], str]]] = {
    301: (TransportError, _WRONG_REGION),
    400: (TransportError, "the service takes the request for malformed: check region, endpoint_url and credentials"),
    401: (AccessDenied, _DENIED),
    403: (AccessDenied, _DENIED),
    404: (ObjectMissing, "there is no such object"),
    412: _BY_CODE["PreconditionFailed"],
}

_CREDENTIALS: Final = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.RefreshWithMFAUnsupportedError,
    boto.SSOError,
    boto.TokenRetrievalError,
)
_SETTINGS: Final = (
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.InvalidConfigError,
    boto.ConfigNotFound,
    boto.NoRegionError,
    boto.InvalidRegionError,
    boto.ParamValidationError,
    boto.InvalidProxiesConfigError,
    boto.EndpointProviderError,
)


@contextlib.contextmanager
def translated(target: Target) -> Iterator[None]:
    """Turn what botocore raises in the block into errors about ``target``.

    Raises:
        ConfigError: A profile, region or name is wrong.
        PlanError: The range lies outside of the object.
        TransportError: The service refused, or could not be reached.
    """
    try:
        yield
    except ClientError as error:
        raise _refusal(error, target) from error
    except BotoCoreError as error:
        raise _failure(error, target) from error
    except RuntimeError as error:
        if "credentials" not in str(error):
            raise
        # botocore's way to say that those in the environment, or of a role, have expired.
        raise target.error(AccessDenied, f"{error} {_GIVE_CREDENTIALS}", attempts=0) from error


def _refusal(error: ClientError, target: Target) -> MpreaderError:
    """Make the error for a response of the service that is a refusal."""
    details = error.response.get("Error", {})
    facts = error.response.get("ResponseMetadata", {})
    status = facts.get("HTTPStatusCode", 0)
    code = details.get("Code", "")
    # A response without a body, as to a HEAD, has no code of its own: botocore puts the status in its place.
    reason = "" if code == str(status) else f" {code}: {details.get('Message', '')}"
    said = f"HTTP {status}{reason}".rstrip(": ")
    if code == "InvalidRange" or status == 416:
        return PlanError(f"{target}: the range {target.range} lies outside of the object ({said})")
    # The code says more than the status: a missing bucket and a missing key are both 404.
    kind, advice = _BY_CODE.get(code) or _BY_STATUS.get(status) or (TransportError, "the service failed")
    names_region = "Region" in details or "x-amz-bucket-region" in facts.get("HTTPHeaders", {})
    if status in _REDIRECTS and not names_region:
        kind, advice = TransportError, _NO_REGION
    return target.error(kind, f"{advice} ({said})", facts.get("RetryAttempts", 0) + 1)


def _failure(error: BotoCoreError, target: Target) -> MpreaderError:
    """Make the error for a failure before there was a response."""
    # Some of these texts have line breaks, and the message of an error is one line.
    if isinstance(error, _SETTINGS):
        return ConfigError(f"{target}: {' '.join(str(error).split())}")
    # No attempt: without credentials no request was made.
    if isinstance(error, _CREDENTIALS):
        return target.error(AccessDenied, f"{error}; {_GIVE_CREDENTIALS}", attempts=0)
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError)):
        advice = "check endpoint_url, region, proxies and certificates"
        return target.error(TransportError, f"{error}; {advice}", target.max_attempts)
    return target.error(TransportError, str(error), attempts=1)
