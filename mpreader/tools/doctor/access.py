"""Checks of the access to S3: names, proxies, clocks, regions, credentials, permissions.

:mod:`mpreader.s3.account` asks the questions; this module judges the answers. Each question that may take long has a
thread of its own, all are asked at the same time, and those without an answer after a few seconds are given up.
:func:`mpreader.tools.doctor.examine.examine` is the caller.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from datetime import datetime, timedelta, timezone
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from mpreader.config import S3ClientConfig
from mpreader.errors import AccessDenied, ConfigError, ObjectMissing
from mpreader.s3 import parse_s3_uri
from mpreader.s3.account import Account, NoResponse, Readable, ServiceResponse
from mpreader.s3.credentials import SOURCES
from mpreader.s3.failure import code_of
from mpreader.s3.identity import Identity
from mpreader.sources.network import proxy_for
from mpreader.tools.doctor.finding import Finding
from mpreader.tools.doctor.version import version_findings

__all__ = ["begin", "examine_access"]

Found = TypeVar("Found")

_LIMIT_S: Final = 5.0
_SOON: Final = timedelta(minutes=15)  # credentials that end sooner may end within a load
# S3 refuses requests at 15 minutes. A clock that is off by this much gets there, and is worth mending before it does.
_SKEW_WARN: Final = timedelta(minutes=1)
_SKEW_FAIL: Final = timedelta(minutes=5)
_SET_CLOCK: Final = "sudo chronyc makestep; to keep it right: sudo timedatectl set-ntp true"
# Remedies for credentials that have expired, by the same names. All others come from a file.
_RENEWALS: Final = {
    "env": "unset AWS_CREDENTIAL_EXPIRATION; export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… AWS_SESSION_TOKEN=…",
    "sso": "aws sso login",
    "login": "aws login",
    "custom-process": "see what the profile's credential_process prints: aws configure export-credentials",
}
# Remedies by the cause of a NoResponse.
_CONNECTION_REMEDIES: Final = {
    "tls": "export AWS_CA_BUNDLE=/path/to/the/authorities.pem, that of the endpoint's or the proxy's certificate",
    "proxy": "correct HTTP_PROXY and HTTPS_PROXY, or go past the proxy: export NO_PROXY={host}",
    "timeout": "check firewall, route and VPC endpoint: curl -v --max-time 5 {url}",
    "connection": "correct --endpoint-url or AWS_ENDPOINT_URL_S3, then check: curl -v --max-time 5 {url}",
}


def examine_access(source: str | None, config: S3ClientConfig, limit_s: float = _LIMIT_S) -> Iterator[Finding]:
    """Check what needs the network, everything at the same time.

    Args:
        source: ``s3://bucket`` or ``s3://bucket/prefix``; None: only the service is asked.
        config: Settings of the S3 client.
        limit_s: Seconds after which a question that has no answer yet is given up.

    Raises:
        ConfigError: ``source`` is no ``s3://`` URI.
    """
    bucket, prefix = parse_s3_uri(source) if source else ("", "")
    try:
        account = Account(config, bucket)
    except ConfigError as error:
        remedy = "correct --profile, --region, --endpoint-url or the bucket's name: aws configure list shows them"
        yield Finding("settings of S3", "fail", "wrong", str(error), remedy)
        return
    deadline = time.monotonic() + limit_s
    host = urlsplit(account.url).hostname or ""
    addresses = begin(lambda: _addresses(host))
    response = begin(account.probe)
    identity = begin(account.identify)
    readable = begin(lambda: _read(account, response, identity, prefix, config)) if bucket else None
    asked: list[Future[Any]] = [addresses, response, identity, *([] if readable is None else [readable])]
    # Threads that have no answer by then go on; they are daemons, and so do not keep the command from ending.
    wait(asked, max(0.0, deadline - time.monotonic()))
    yield from _proxy_and_name(account, host, addresses, limit_s)
    yield from _service(account, response, config)
    yield _credentials(identity, config)
    # Where the bucket was not asked for, a finding above says why; a second one would only repeat it.
    if readable is not None and not isinstance(_failure(readable), _NotAskedError):
        yield _bucket(account, f"s3://{bucket}/{prefix}", readable, config)
        if _failure(readable) is None:
            yield from version_findings(readable.result().validators)


class _NotAskedError(Exception):
    """The bucket was not asked for: the service or the credentials failed, which has a finding of its own."""


def _addresses(host: str) -> list[str]:
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})


def begin(work: Callable[[], Found]) -> Future[Found]:
    """Start ``work`` in a daemon thread, since a look-up of a name or of credentials may take minutes."""
    # Not a ThreadPoolExecutor: the interpreter waits for its threads when it ends.
    future: Future[Found] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # noqa: BLE001  # it becomes a finding
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _read(
    account: Account, response: Future[ServiceResponse], identity: Future[Identity], prefix: str, config: S3ClientConfig
) -> Readable:
    """Ask for the bucket, once it is known that the service responds and that there are credentials."""
    # This waits for both futures, without a limit: it runs in a thread that is given up as the others are.
    if response.exception() or not (config.unsigned or (identity.exception() is None and identity.result().source)):
        raise _NotAskedError
    return account.read(prefix)


def _failure(future: Future[Found]) -> BaseException | None:
    """Error that a question ended in, ``TimeoutError`` if it has no answer yet; None if it has one. Does not wait."""
    return future.exception() if future.done() else TimeoutError("no answer in time")


def _proxy_and_name(account: Account, host: str, addresses: Future[list[str]], limit_s: float) -> Iterator[Finding]:
    """Findings of the proxy and of the service's name."""
    try:
        proxy = proxy_for(account.url)
    except ConfigError as error:
        variable = f"{urlsplit(account.url).scheme.upper()}_PROXY"
        yield Finding("proxy", "fail", variable, str(error), f"export {variable}=http://host:port, or unset {variable}")
        return
    yield Finding("proxy", "ok", "none" if proxy is None else f"{proxy.host}:{proxy.port}")
    if proxy is not None:
        return  # the proxy looks the name up, not this host
    failure = _failure(addresses)
    if failure is None:
        found = addresses.result()
        more = ", …" if len(found) > 3 else ""
        count = "1 address" if len(found) == 1 else f"{len(found)} addresses"
        yield Finding("name", "ok", f"{host} has {count}: {', '.join(found[:3])}{more}")
        return
    why = failure.strerror if isinstance(failure, socket.gaierror) else f"no answer within {limit_s:g} s"
    remedy = f"correct --endpoint-url or --region, else /etc/resolv.conf; then check: getent hosts {host}"
    yield Finding("name", "fail", host, f"it has no address: {why}", remedy)


def _service(account: Account, response: Future[ServiceResponse], config: S3ClientConfig) -> Iterator[Finding]:
    """Findings of the service's response: that it is there, its clock, the bucket's region."""
    failure = _failure(response)
    if failure is not None:
        cause = failure.cause if isinstance(failure, NoResponse) else "timeout"
        remedy = _CONNECTION_REMEDIES[cause].format(url=account.url, host=urlsplit(account.url).hostname)
        yield Finding("endpoint", "fail", account.url, f"it can't be asked: {failure}", remedy)
        return
    # A refusal (403, 404) is an answer, too: the request was sent without a signature.
    found = response.result()
    value = f"{account.url} answers within {found.seconds * 1000:.0f} ms"
    if found.status >= 500:
        problem = f"the service is not well: HTTP {found.status}"
        yield Finding("endpoint", "warn", value, problem, f"try again later: curl -I {account.url}")
    else:
        yield Finding("endpoint", "ok", value)
    if found.skew is not None:
        yield _clock(found.skew)
    yield _region(account, found.bucket_region, config)


def _clock(skew: timedelta) -> Finding:
    seconds = abs(skew.total_seconds())
    if seconds < 2:  # the service's Date header has whole seconds
        return Finding("clock", "ok", "as the service's")
    value = f"{seconds:,.0f} s {'ahead of' if skew > timedelta() else 'behind'} the service's"
    if abs(skew) <= _SKEW_WARN:
        return Finding("clock", "ok", value)
    problem = "S3 refuses requests of a clock that is 15 minutes off (RequestTimeTooSkewed)"
    return Finding("clock", "fail" if abs(skew) > _SKEW_FAIL else "warn", value, problem, _SET_CLOCK)


def _region(account: Account, of_bucket: str | None, config: S3ClientConfig) -> Finding:
    # Other tools for AWS read AWS_REGION, so it is often the only one that is set.
    ignored = os.environ.get("AWS_REGION", account.region)
    if not (config.region or of_bucket) and ignored != account.region:
        problem = f"AWS_REGION={ignored} is ignored: boto3 reads AWS_DEFAULT_REGION"
        return Finding("region", "warn", account.region, problem, f"export AWS_DEFAULT_REGION={ignored}")
    if not of_bucket or of_bucket == account.region:
        return Finding("region", "ok", f"{account.region}, as the bucket's" if of_bucket else account.region)
    problem = f"the bucket is in {of_bucket}: it is followed there, which takes time at each start"
    remedy = f"--region {of_bucket}" if config.region else f"export AWS_DEFAULT_REGION={of_bucket}"
    return Finding("region", "warn", account.region, problem, remedy)


def _credentials(identity: Future[Identity], config: S3ClientConfig) -> Finding:
    if config.unsigned:
        return Finding("credentials", "ok", "none are sent (--unsigned)")
    failure = _failure(identity)
    if failure is not None:
        remedy = "correct the profile, or choose another: aws configure list; aws configure list-profiles; --profile …"
        return Finding("credentials", "fail", "can't be had", str(failure), remedy)
    found = identity.result()
    if not found.source:
        problem = "there is nothing to sign requests with"
        return Finding("credentials", "fail", "none", problem, "aws configure (or --unsigned for a public bucket)")
    return _found_credentials(found, datetime.now(timezone.utc))


def _found_credentials(found: Identity, now: datetime) -> Finding:
    value = f"from {SOURCES.get(found.source, found.source)}"
    if found.source != "env":
        value += f", profile {found.profile}"
    renewal = _RENEWALS.get(found.source, f"write new ones into the file: aws configure --profile {found.profile}")
    # The order of the checks is that of their gravity: there is one finding for the credentials.
    if found.lacks_token:
        problem = "they are temporary ones, which are good for nothing without their session token"
        return Finding("credentials", "fail", value, problem, "export AWS_SESSION_TOKEN=…, or: aws_session_token = …")
    if found.expires is not None:
        value += f", good until {found.expires.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"
        if found.expires <= now:
            return Finding("credentials", "fail", value, "they have expired", renewal)
        if found.expires - now < _SOON and not found.is_renewed:
            return Finding("credentials", "warn", value, "they expire soon, and nothing renews them", renewal)
        value += ", then renewed" if found.is_renewed else ""
    # A frequent mistake: keys in the environment take precedence over AWS_PROFILE without a word.
    if found.source == "env" and found.profile != "default":
        problem = f"the keys of the environment are used, not the profile {found.profile} of AWS_PROFILE"
        remedy = "unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN, or: unset AWS_PROFILE"
        return Finding("credentials", "warn", value, problem, remedy)
    return Finding("credentials", "ok", value)


def _bucket(account: Account, source: str, readable: Future[Readable], config: S3ClientConfig) -> Finding:
    failure = _failure(readable)
    if failure is not None:
        # Cleaned, since a service may repeat credentials that it was sent.
        return Finding("bucket", "fail", source, account.clean(str(failure)), _bucket_remedy(source, failure))
    found = readable.result()
    if found.key is None:
        # An empty bucket may be meant; an empty prefix is mostly a mistyped one.
        if not parse_s3_uri(source)[1]:
            return Finding("bucket", "ok", f"{source} is empty, and may be listed")
        folder = source.rstrip("/").rpartition("/")[0]
        return Finding(
            "bucket", "fail", source, "no object's name begins so", f"see which there are: aws s3 ls {folder}/"
        )
    way = _way_of_workers(found, config)
    if way is None:
        return _refused_workers(source, found)
    value = f"{source} may be read ({found.key}{way})"
    if not found.is_listed:
        problem = "it may not be listed: S3 calls a missing object access denied then, and folders can't be read"
        return Finding("bucket", "warn", value, problem, _allow(source, "s3:ListBucket", is_bucket=True))
    return Finding("bucket", "ok", f"{value} and listed")


def _way_of_workers(found: Readable, config: S3ClientConfig) -> str | None:
    """The signatures by which the workers will read, in words, "" where that needs no mention; None: by none."""
    passing = [place for place, refusal in found.refusals.items() if not refusal]
    if config.unsigned or config.signing in passing or (config.signing == "auto" and "query" in passing):
        return "" if passing else None
    if config.signing == "auto" and passing:
        return f", by signatures in headers: presigned URLs are refused with {found.refusals['query']}"
    return None


def _refused_workers(source: str, found: Readable) -> Finding:
    said = ", ".join(f"{place}: {refusal or 'passes'}" for place, refusal in found.refusals.items())
    problem = f"boto3 reads it, but the requests of the workers are refused, by the place of their signature: {said}"
    if "" in found.refusals.values():
        return Finding("bucket", "fail", source, problem, '--signing auto, or S3ClientConfig(signing="auto")')
    remedy = "look at what stands between, such as a proxy, and at conditions of the bucket policy"
    return Finding("bucket", "fail", source, problem, remedy)


def _bucket_remedy(source: str, failure: BaseException) -> str:
    # S3's code is looked at first, since one class of mpreader's errors stands for several of them.
    code = code_of(failure)
    if code == "RequestTimeTooSkewed":
        return _SET_CLOCK
    if code in ("AccessDenied", "AllAccessDisabled"):
        return _allow(source, "s3:GetObject", is_bucket=False)
    if isinstance(failure, AccessDenied):
        return "get new credentials: aws sso login, or aws configure; who they are: aws sts get-caller-identity"
    if isinstance(failure, ObjectMissing):
        return "correct the bucket's name (aws s3 ls shows yours), or the --endpoint-url that it lies behind"
    return f"correct what it says, then check: aws s3 ls {source}"


def _allow(source: str, action: str, *, is_bucket: bool) -> str:
    # Listing is a right to the bucket, reading one to its objects.
    bucket, prefix = parse_s3_uri(source)
    resource = f"arn:aws:s3:::{bucket}" if is_bucket else f"arn:aws:s3:::{bucket}/{prefix}*"
    return f'allow it in the IAM or bucket policy: "Action": "{action}", "Resource": "{resource}"'
