"""Who we are to S3, and what it says to us: what ``mpreader doctor`` asks. Holds no secret."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from mpreader.config import S3ClientConfig
from mpreader.errors import ConfigError

__all__ = ["Answer", "Identity", "ask", "identify", "service_url"]

_TIMEOUT_S: Final = 4


@dataclass(frozen=True, slots=True)
class Identity:
    """The credentials that are found.

    Attributes:
        source: Where they come from, in botocore's words, such as ``"env"``; "" if there are none.
        expires: When they do, in UTC; None: never, or nobody knows.
    """

    source: str
    expires: datetime.datetime | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the service said to one small request.

    Attributes:
        status: HTTP status; 0: there was no answer.
        date: The service's clock, in UTC; None where it did not say.
        received: Our clock then, in UTC.
        bucket_region: Region of the bucket; None where it did not say.
        error: Why there was no answer, in words.
    """

    status: int
    date: datetime.datetime | None
    received: datetime.datetime
    bucket_region: str | None
    error: str = ""


def identify(config: S3ClientConfig) -> Identity:
    """Find credentials, as a client of these settings would.

    Raises:
        ConfigError: The profile does not exist, or a file can't be read.
    """
    try:
        credentials = _session(config).get_credentials()
        if credentials is None:
            return Identity("", None)
        expires = getattr(credentials, "_expiry_time", None)  # botocore tells it to nobody else
        if credentials.method == "env" and os.environ.get("AWS_CREDENTIAL_EXPIRATION"):
            expires = datetime.datetime.fromisoformat(os.environ["AWS_CREDENTIAL_EXPIRATION"].replace("Z", "+00:00"))
        return Identity(credentials.method, expires)
    except BotoCoreError as error:
        raise ConfigError(str(error)) from error


def service_url(config: S3ClientConfig) -> tuple[str, str]:
    """URL of the service, and the region that is configured.

    Raises:
        ConfigError: A setting is wrong.
    """
    client = _client(config, is_signed=False)
    try:
        return client.meta.endpoint_url, client.meta.region_name
    finally:
        client.close()


def ask(config: S3ClientConfig, bucket: str, *, is_signed: bool) -> Answer:
    """Ask for a bucket, or where none is named for the list of them; once, and not for long.

    Raises:
        ConfigError: A setting is wrong.
    """
    client = _client(config, is_signed=is_signed)
    error = ""
    try:
        answer: dict[str, Any] = client.head_bucket(Bucket=bucket) if bucket else client.list_buckets()
        facts = answer["ResponseMetadata"]
    except ClientError as refused:  # that is an answer, too
        facts = refused.response.get("ResponseMetadata", {})
    except BotoCoreError as failed:
        facts, error = {}, " ".join(str(failed).split())
    finally:
        client.close()
    headers = facts.get("HTTPHeaders", {})
    return Answer(
        status=facts.get("HTTPStatusCode", 0),
        date=parsedate_to_datetime(headers["date"]) if "date" in headers else None,
        received=_now(),
        bucket_region=headers.get("x-amz-bucket-region"),
        error=error,
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _session(config: S3ClientConfig) -> botocore.session.Session:
    return botocore.session.Session(profile=config.profile)


def _client(config: S3ClientConfig, *, is_signed: bool) -> Any:
    settings = Config(
        signature_version=None if is_signed else UNSIGNED,
        connect_timeout=_TIMEOUT_S,
        read_timeout=_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if config.force_path_style else None,
    )
    try:
        return _session(config).create_client(
            "s3", region_name=config.region, endpoint_url=config.endpoint_url, config=settings
        )
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
