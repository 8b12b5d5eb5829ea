"""The way to S3: names, clocks, credentials, regions, and whether a bucket may be read."""

from __future__ import annotations

import datetime
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar
from urllib.parse import urlsplit

from mpreader.config import S3ClientConfig
from mpreader.doctor import Finding
from mpreader.errors import ConfigError, MpreaderError
from mpreader.web import proxy_for

__all__ = ["examine_access"]

Found = TypeVar("Found")

_LIMIT_S: Final = 10.0
_SOON: Final = datetime.timedelta(minutes=15)
_SKEW_WARN_S: Final = 60
_SKEW_FAIL_S: Final = 300  # S3 refuses at 900
_SOURCES: Final = {
    "env": "environment variables",
    "shared-credentials-file": "the credentials file",
    "config-file": "the configuration file",
    "iam-role": "the instance's role",
    "container-role": "the container's role",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "a role for a web identity",
    "sso": "AWS SSO",
    "custom-process": "a credential process",
}
_GIVE_CREDENTIALS: Final = "aws configure, aws sso login, AWS_PROFILE=…, a role; or --unsigned for a public bucket"


def examine_access(source: str | None, config: S3ClientConfig) -> Iterator[Finding]:
    """Look at what needs the network.

    Raises:
        ConfigError: ``source`` is no ``s3://`` URI.
    """
    from mpreader.s3 import parse_s3_uri
    from mpreader.s3.account import ask, identify, service_url

    bucket, prefix = parse_s3_uri(source) if source else ("", "")
    try:
        url, region = service_url(config)
    except ConfigError as error:
        yield Finding("settings of S3", "fail", "wrong", str(error), "correct --profile, --region or --endpoint-url")
        return
    identity = _in_time(lambda: identify(config))
    has_credentials = False
    if config.unsigned:
        yield Finding("credentials", "ok", "none are sent (--unsigned)")
    elif isinstance(identity, Exception):
        yield Finding("credentials", "fail", "not found", str(identity), _GIVE_CREDENTIALS)
    else:
        has_credentials = bool(identity.source)
        yield _credentials(identity.source, identity.expires, datetime.datetime.now(datetime.timezone.utc))
    yield _addresses(url)
    answer = _in_time(lambda: ask(config, bucket, is_signed=has_credentials))
    if isinstance(answer, Exception):
        yield Finding("service", "fail", url, str(answer), "check --endpoint-url, firewalls, routes and VPC endpoints")
        return
    if not answer.status:
        yield Finding("service", "fail", url, answer.error, "check --endpoint-url, proxies, firewalls and certificates")
        return
    yield Finding("service", "ok", f"{url} answers")
    if answer.date is not None:
        yield _clock(answer.date, answer.received)
    yield _region(region, answer.bucket_region)
    if source and (has_credentials or config.unsigned):
        yield _access(source, bucket, prefix, config)


def _in_time(ask: Callable[[], Found]) -> Found | Exception:
    """The answer, or why there is none: name servers and metadata services may keep one waiting for very long."""
    answers: queue.SimpleQueue[Found | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put(ask())
        except Exception as error:  # noqa: BLE001  # it is told
            answers.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=_LIMIT_S)
    except queue.Empty:
        return TimeoutError(f"no answer within {_LIMIT_S:.0f} s")


def _credentials(source: str, expires: datetime.datetime | None, now: datetime.datetime) -> Finding:
    if not source:
        return Finding("credentials", "fail", "none", "there is nothing to sign requests with", _GIVE_CREDENTIALS)
    value = f"from {_SOURCES.get(source, source)}"
    if expires is None:
        return Finding("credentials", "ok", value)
    value += f", good until {expires:%Y-%m-%d %H:%M} UTC"
    renew = "aws sso login, or fetch new ones the way you got these"
    if expires <= now:
        return Finding("credentials", "fail", value, "they have expired", renew)
    if expires - now < _SOON and source == "env":
        return Finding("credentials", "warn", value, "they expire soon, and can't be renewed from here", renew)
    return Finding("credentials", "ok", value)


def _addresses(url: str) -> Finding:
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = proxy_for(url)
    if proxy is not None:
        return Finding("name", "ok", f"{host} through the proxy {proxy.host}:{proxy.port}")
    found = _in_time(lambda: socket.getaddrinfo(host, parts.port or 443, type=socket.SOCK_STREAM))
    if isinstance(found, Exception):
        remedy = f"check --endpoint-url, --region and /etc/resolv.conf: getent hosts {host}"
        return Finding("name", "fail", host, f"it has no address: {found}", remedy)
    addresses = sorted({str(entry[4][0]) for entry in found})
    return Finding("name", "ok", f"{host} has {len(addresses)} addresses: {', '.join(addresses[:4])}")


def _clock(theirs: datetime.datetime, ours: datetime.datetime) -> Finding:
    skew_s = (ours - theirs).total_seconds()
    value = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the service's"
    if abs(skew_s) < _SKEW_WARN_S:
        return Finding("clock", "ok", value)
    status: Final = "fail" if abs(skew_s) >= _SKEW_FAIL_S else "warn"
    problem = "S3 refuses requests that are 15 minutes off (RequestTimeTooSkewed)"
    return Finding("clock", status, value, problem, "sudo chronyc makestep (or: sudo timedatectl set-ntp true)")


def _region(configured: str, of_bucket: str | None) -> Finding:
    if of_bucket and of_bucket != configured:
        problem = f"the bucket is in {of_bucket}: it is followed there, which costs a request"
        return Finding(
            "region", "warn", configured, problem, f"--region {of_bucket}, or AWS_DEFAULT_REGION={of_bucket}"
        )
    return Finding("region", "ok", configured)


def _access(source: str, bucket: str, prefix: str, config: S3ClientConfig) -> Finding:
    from mpreader.s3 import S3Client

    client = S3Client(s3client_config=config)
    try:
        page = _in_time(lambda: next(client.list_objects(bucket, prefix, max_keys=1)))
    finally:
        client.close()
    if isinstance(page, Exception):
        remedy = "" if isinstance(page, MpreaderError) else "try again"
        return Finding("access", "fail", source, str(page), remedy or "see what it says; try: aws s3 ls " + source)
    if not page.object_info:
        return Finding("access", "fail", source, "there is no object whose name begins so", f"aws s3 ls s3://{bucket}/")
    return Finding("access", "ok", f"{source} can be listed")
