"""Translation of botocore's errors: each becomes an error of mpreader whose message names the remedy.

Used around every request of this package; botocore's errors must be translated nowhere else. A body that breaks while
it is read is not an error yet, and is left to :mod:`mpreader.s3.stream`, which resumes it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from botocore import exceptions as boto
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from mpreader.errors import (
    AccessDenied,
    ConfigError,
    MpreaderError,
    ObjectChanged,
    ObjectMissing,
    PlanError,
    TransportError,
)
from mpreader.s3.credentials import ProviderFailed
from mpreader.s3.redaction import redacted

__all__ = ["Target", "Unusable", "code_of", "translated"]


class Unusable(Exception):
    """A response that botocore takes for a right one, and that is none; its text says why."""


class Target(NamedTuple):
    """Subject of a request: bucket, key and range, to be named in an error about the request.

    Attributes:
        bucket: The bucket.
        key: The key; "" for a request about the whole bucket.
        where: Returns region and endpoint of the requests for a bucket, as text for an error's message. A function,
            since they are known for certain only after the request.
        max_attempts: Requests that boto3 makes before it gives up.
        range: Bytes that were requested, end exclusive; None: no range.
    """

    bucket: str
    key: str
    where: Callable[[str], str]
    max_attempts: int
    range: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def error(self, kind: type[TransportError], message: str, attempts: int) -> TransportError:
        """Make an error about this subject."""
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
_ENDPOINT: Final = "S3ClientConfig(endpoint_url=…), or AWS_ENDPOINT_URL_S3,"
_NO_REGION: Final = (
    "the service redirects the request, perhaps to another region, but names none: check endpoint_url, and "
    "S3ClientConfig(region=…)"
)
_CHECK: Final = "check that endpoint_url is that of an S3 service, and what stands between"
# botocore follows only redirects to another region. Others come, for example, from a web server that redirects http to
# https.
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

# Class and advice by S3's error code.
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
# The same by HTTP status, for responses whose code is unknown, or that have no body with a code.
_BY_STATUS: Final[dict[int, tuple[type[TransportError], str]]] = {
    301: (TransportError, _WRONG_REGION),
    400: (TransportError, "the service takes the request for malformed: check region, endpoint_url and credentials"),
    401: (AccessDenied, _DENIED),
    403: (AccessDenied, _DENIED),
    404: (ObjectMissing, "there is no such object"),
    412: _BY_CODE["PreconditionFailed"],
}

# Errors for which botocore makes no request: it found no credentials, or could not renew them.
_CREDENTIALS: Final = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.RefreshWithMFAUnsupportedError,
    boto.SSOError,
    boto.TokenRetrievalError,
)
# Errors of the settings, of the environment, or of an argument such as a bucket's name.
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
    boto.MissingDependencyException,  # signing for access points of several regions needs botocore[crt]
    boto.UnsupportedS3AccesspointConfigurationError,
    boto.UnsupportedS3ArnError,
    boto.UnsupportedS3ConfigurationError,
)


@contextlib.contextmanager
def translated(target: Target) -> Iterator[None]:
    """Turn what botocore raises in the block into errors about ``target``.

    Raises:
        ConfigError: A profile, region or name is wrong.
        PlanError: The range lies outside of the object.
        TransportError: The service refused, or could not be reached.
    """
    failure: MpreaderError | None = None
    try:
        yield
    except (MpreaderError, MemoryError):
        raise
    except ClientError as error:
        raise _refusal(error, target) from error
    except BotoCoreError as error:
        raise _failure(error, target) from error
    except Unusable as error:
        raise target.error(TransportError, f"{error}; {_CHECK}", attempts=1) from None
    except ProviderFailed as error:
        failure = _provider_failure(error, target)
    # botocore and urllib3 let through what they did not expect: a KeyError, a ValueError of a date, a RecursionError.
    except Exception as error:
        raise _surprise(error, target) from error
    if failure is not None:  # raised here, so that nothing leads to the error of the provider
        raise failure


def _provider_failure(error: ProviderFailed, target: Target) -> MpreaderError:
    if error.is_setting:
        return ConfigError(f"{target}: {error}")
    # 0 attempts: without credentials no request was made.
    return target.error(AccessDenied, f"{error}; {_GIVE_CREDENTIALS}", attempts=0)


def _surprise(error: Exception, target: Target) -> MpreaderError:
    """Make the error for what is neither botocore's nor ours."""
    text = redacted(str(error))
    # botocore raises a plain RuntimeError if the credentials of the environment, or of a role, have expired. There is
    # no class to tell it by, only its text.
    if isinstance(error, RuntimeError) and "credentials" in text:
        return target.error(AccessDenied, f"{text} {_GIVE_CREDENTIALS}", attempts=0)
    said = type(error).__name__
    # A ResponseParserError repeats the whole response.
    if text and not isinstance(error, ResponseParserError):
        said += f": {text}"
    message = f"boto3 can't make sense of the service's answer ({said}); {_CHECK}"
    return target.error(TransportError, message, attempts=1)


def code_of(error: BaseException) -> str:
    """Return S3's code of an error that :func:`translated` raised, such as ``"AccessDenied"``; "" if it has none."""
    refusal = error.__cause__  # botocore's error
    return str(refusal.response.get("Error", {}).get("Code") or "") if isinstance(refusal, ClientError) else ""


def _refusal(error: ClientError, target: Target) -> MpreaderError:
    """Make the error for a response in which the service refuses the request."""
    details = error.response.get("Error", {})
    facts = error.response.get("ResponseMetadata", {})
    status = facts.get("HTTPStatusCode", 0)
    code = details.get("Code") or ""  # None where the service sends an empty one
    # The response to a HEAD has no body, and so no code: botocore puts the status in its place.
    # The message may be missing, or be there and empty, for which botocore has None.
    reason = "" if code == str(status) else f" {code}: {redacted(details.get('Message') or '')}"
    said = f"HTTP {status}{reason}".rstrip(": ")
    if code == "InvalidRange" or status == 416:
        return PlanError(f"{target}: the range {target.range} lies outside of the object ({said})")
    # The code comes first, since it is more exact: a missing bucket and a missing key both have status 404.
    kind, advice = _BY_CODE.get(code) or _BY_STATUS.get(status) or (TransportError, "the service failed")
    names_region = "Region" in details or "x-amz-bucket-region" in facts.get("HTTPHeaders", {})
    if status in _REDIRECTS and not names_region:
        kind, advice = TransportError, _redirect_advice(details, facts)
    return target.error(kind, f"{advice} ({said})", facts.get("RetryAttempts", 0) + 1)


def _redirect_advice(details: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Return where a redirect leads to, and what to set."""
    # S3 names the host alone, in the document; other servers name a URL, in the header.
    location = facts.get("HTTPHeaders", {}).get("location") or details.get("Endpoint") or ""
    match = re.match(r"(?:(https?://)(?:[^/?#]*@)?)?([^\s/?#@]{1,255})", location, re.IGNORECASE)
    if match is None:
        return _NO_REGION
    where = (match[1] or "").lower() + match[2]
    return f"the service redirects the request to {where}: if it is there, set {_ENDPOINT} to it"


def _failure(error: BotoCoreError, target: Target) -> MpreaderError:
    """Make the error for a request that got no response."""
    if isinstance(error, _SETTINGS):
        # Some of these texts have several lines; the message of an error is one line.
        return ConfigError(f"{target}: {redacted(str(error))}")
    if isinstance(error, _CREDENTIALS):
        # 0 attempts: without credentials no request was made.
        return target.error(AccessDenied, f"{redacted(str(error))}; {_GIVE_CREDENTIALS}", attempts=0)
    if isinstance(error, (boto.HTTPClientError, boto.ConnectionError)):
        advice = "check endpoint_url, region, proxies and certificates"
        return target.error(TransportError, f"{redacted(str(error))}; {advice}", target.max_attempts)
    return target.error(TransportError, f"{redacted(str(error))}; {_CHECK}", attempts=1)
