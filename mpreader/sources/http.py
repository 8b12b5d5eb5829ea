"""HttpSource: an object behind any http(s) URL as a source of the pool.

In the main process, by urllib3, it requests the object's size and version, and follows redirects. The workers can't
follow redirects: they get a route to the URL at which the redirects end. No error and no repr may show a URL's query,
user name or password, since these may be secrets.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import urllib3
from urllib3.util import Retry, Timeout

from mpreader.config import MAX_OBJECT_BYTES
from mpreader.errors import AccessDenied, ConfigError, ObjectMissing, TransportError
from mpreader.pool.source import ObjectVersion, Refusal
from mpreader.pool.worker.failure import BUSY_STATUSES, REDIRECTS
from mpreader.pool.worker.messages import FailureKind
from mpreader.pool.worker.partial_content import is_compressed
from mpreader.pool.worker.route import Route
from mpreader.pool.worker.version import validators_of
from mpreader.sources.network import Headers, ca_file, proxy_for, route_to, tls_context
from mpreader.sources.url import Url, without_urls

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HttpSource"]

_MAX_REDIRECTS: Final = 10
_MAX_DIGITS: Final = 18
# Statuses of a HEAD after which no GET is tried. After all others one is: some servers refuse HEAD, or leave out the
# size (200), and a URL that is presigned for GET allows no other method.
_NO_GET_AFTER: Final = frozenset({404, 410, *BUSY_STATUSES})
_TIMEOUT: Final = Timeout(connect=10, read=60)  # seconds
_DENIED: Final = (
    "access denied: the URL may have expired, or need a token, or user name and password (https://user:password@host/…)"
)


class HttpSource:
    """Object behind an http(s) URL. See :class:`mpreader.pool.source.Source`.

    Redirects are followed when the source is opened, and the workers read from the server at which they end. A user
    name and password in the URL are sent as basic authentication, to the URL's own server only. Proxies are those of
    ``HTTP_PROXY``, ``HTTPS_PROXY`` and ``NO_PROXY``; certificate authorities those of ``REQUESTS_CA_BUNDLE`` or
    ``SSL_CERT_FILE``, else the system's.

    Args:
        url: The URL; its fragment is ignored.
        max_attempts: Largest number of requests that are made for the same bytes.
        headers: Further headers, such as one with a token. Like a password, they are sent to the URL's own server only.

    Raises:
        ConfigError: ``url`` is not an http(s) URL.
    """

    # Not decided yet: the pool calls open(). A PinnedSource has a version here.
    version: ObjectVersion | None = None

    def __init__(self, url: str, max_attempts: int = 10, headers: Headers = ()) -> None:
        parsed = Url.parse(url)
        self._url = parsed._replace(headers=(*parsed.headers, *headers))
        self._max_attempts = max_attempts
        self._asks_by_get = False  # once the server has redirected a GET, and not the HEAD before it
        # URL at which open() found the redirects to end, until a route is made of it.
        self._unused_target: Url | None = None

    @property
    def bucket(self) -> str:
        """The URL's host, with its port if that is not the default one."""
        return self._url.authority

    @property
    def key(self) -> str:
        """The URL's path, without its query, which may be a secret."""
        return self._url.path

    @property
    def uri(self) -> str:
        """The URL without user name, password and query."""
        return f"{self._url.scheme}://{self.bucket}{self.key}"

    @property
    def max_attempts(self) -> int:
        """Largest number of requests that are made for the same bytes."""
        return self._max_attempts

    def open(self) -> ObjectVersion:
        """Follow redirects, and request the object's present version from the server at which they end.

        Raises:
            ObjectMissing: There is nothing at the URL.
            AccessDenied: The server refuses the request.
            TransportError: The server can't be reached, serves no ranges, or does not state the object's size.
        """
        self._unused_target, version = self._resolve()
        return version

    def route(self) -> Route:
        """Make a route to the URL at which the redirects end.

        The first route after ``open`` uses the URL that ``open`` has found. For each further one the redirects are
        followed again.

        Raises:
            TransportError: As for :meth:`open`.
        """
        # Followed again, because a redirect may lead to a URL that expires, and the pool wants another route when it
        # takes the last one for expired.
        target, self._unused_target = self._unused_target, None
        if target is None:
            target, _ = self._resolve()
        return self._route_to(target)

    def other_route(self, refusal: Refusal) -> Route | None:
        """Make a route to the URL at which the redirects of a GET end, where only GETs are redirected.

        Returns:
            The route; None if the server refused for another reason than a redirect.

        Raises:
            TransportError: As for :meth:`open`.
        """
        if refusal.kind is not FailureKind.REDIRECTED:
            return None
        self._asks_by_get, self._unused_target = True, None
        return self._route_to(self._resolve()[0])

    def _route_to(self, target: Url) -> Route:
        return route_to(str(target), target.headers, proxy_for(str(target)), ca_file() if target.is_tls else None)

    def __repr__(self) -> str:
        return f"<HttpSource {self.uri}>"

    def _resolve(self) -> tuple[Url, ObjectVersion]:
        """Return the URL at which the redirects end, and the version of the object there."""
        length = None
        if not self._asks_by_get:
            target, status, headers = self._follow("HEAD", self._url, {})
            length = headers.get("Content-Length") if status == 200 else None
            if length is not None and _is_number(length) and not is_compressed(headers.get("Content-Encoding", "")):
                return target, self._version(length, headers)
        if self._asks_by_get or status not in _NO_GET_AFTER:
            target, status, headers = self._follow("GET", self._url, {"Range": "bytes=0-0"})
        return target, self._version_of_get(status, headers, length)

    def _version_of_get(self, status: int, headers: Mapping[str, str], length: str | None) -> ObjectVersion:
        """Return the version that the response to a GET of the first byte states.

        Args:
            status: Status of the response.
            headers: Its headers.
            length: Size that a HEAD has stated of an object with a Content-Encoding. It is that of the stored bytes, or
                that of what the server makes of them for each answer: the range is always one of stored bytes.
        """
        encoding = headers.get("Content-Encoding", "")
        if status == 200:
            # All of the object: it has one byte, or none, or the server knows no ranges. Then it can be read if it is
            # small enough to be asked for at once. If it has an encoding, nothing shows whether it is stored so.
            total = headers.get("Content-Length", "")
            is_right = total in ("0", "1") or (_is_number(total) and not is_compressed(encoding))
        else:
            # 416 is the response for an empty object, too.
            total = headers.get("Content-Range", "").rpartition("/")[2] or (length or "" if status == 416 else "")
            is_right = status in (206, 416)
        # A refusal has an encoding of its own: that of its text.
        if is_compressed(encoding) and (status == 200 or is_right) and (not is_right or length not in (total, None)):
            raise self._error(TransportError, "the server compresses it; ranges of that can't be read")
        if not is_right:
            raise self._refusal(status)
        return self._version(total, headers)

    def _follow(self, method: str, url: Url, headers: dict[str, str]) -> tuple[Url, int, Mapping[str, str]]:
        """Make a request and follow its redirects.

        Returns:
            The URL at which they end, and status and headers of its response.
        """
        for _ in range(_MAX_REDIRECTS):
            status, response_headers = self._request(method, url, headers)
            location = response_headers.get("Location")
            if status not in REDIRECTS or not location:
                return url, status, response_headers
            try:
                url = url.redirected(location)
            except ValueError as error:  # a ConfigError, or one of the standard library about brackets, say
                reason = error if isinstance(error, ConfigError) else without_urls(error)
                raise self._error(TransportError, f"a redirect can't be followed: {reason}") from None
        raise self._error(TransportError, f"more than {_MAX_REDIRECTS} redirects")

    def _request(self, method: str, url: Url, headers: dict[str, str]) -> tuple[int, Mapping[str, str]]:
        """Return status and headers of the response to a request, which is repeated after a failure that may pass."""
        # identity: a server that compresses would state the size of the compressed body.
        all_headers = {"Accept-Encoding": "identity", **dict(url.headers), **headers}
        retries = _Retry(
            self._max_attempts - 1,
            other=0,  # errors such as a wrong certificate, which stay
            redirect=False,  # _follow does it, and sends the password to the URL's own server only
            status_forcelist=BUSY_STATUSES,
            raise_on_status=False,  # the last status is returned, and becomes an error in _refusal
            respect_retry_after_header=False,  # a server may name an hour
            backoff_factor=0.05,
        )
        try:
            with _manager(url) as manager:
                response = manager.request(
                    method,
                    str(url),
                    headers=all_headers,
                    retries=retries,
                    timeout=_TIMEOUT,
                    redirect=False,
                    preload_content=False,
                )
                response.close()  # unread: the body may be the whole object
        except (ConfigError, MemoryError):
            raise
        # Beside errors of urllib3 and of the socket it may be a ValueError or a KeyError: of a header that urllib3 did
        # not expect, or of a host's name that can't be encoded.
        except Exception as error:  # noqa: BLE001
            reason = getattr(error, "reason", None) or error
            # From None: the text of the cause holds the URL with its query, and a traceback would show it.
            raise self._error(TransportError, f"no answer from {url.authority}: {without_urls(reason)}") from None
        return response.status, response.headers

    def _version(self, size: str, headers: Mapping[str, str]) -> ObjectVersion:
        encoding = headers.get("Content-Encoding", "")
        return ObjectVersion.of(self._size(size), validators_of(headers), encoding)

    def _size(self, text: str) -> int:
        """Return the size that ``text``, a header's value, states."""
        if not _is_number(text):
            raise self._error(TransportError, "the server does not tell its size")
        return int(text)

    def _refusal(self, status: int) -> TransportError:
        if status in (401, 403, 407):
            return self._error(AccessDenied, f"{_DENIED} (HTTP {status})")
        if status in (404, 410):
            return self._error(ObjectMissing, f"there is nothing at this URL (HTTP {status})")
        if status in REDIRECTS:
            return self._error(TransportError, f"the server redirects, but does not say where to (HTTP {status})")
        if status == 200:
            return self._error(TransportError, "the server serves no ranges of it, only the whole")
        return self._error(TransportError, f"the server answers HTTP {status}")

    def _error(self, kind: type[TransportError], message: str) -> TransportError:
        return kind(f"{self.uri}: {message}", bucket=self.bucket, key=self.key, attempts=1)


class _Retry(Retry):
    """Retries that give up on a server that does not speak HTTP, which urllib3 takes for a connection that broke."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> Self:
        for reason in error.args if isinstance(error, urllib3.exceptions.ProtocolError) else ():
            # These two are connections that broke indeed.
            is_broken = isinstance(reason, (http.client.RemoteDisconnected, http.client.IncompleteRead))
            if isinstance(reason, http.client.HTTPException) and not is_broken and error is not None:
                raise error
        return super().increment(method, url, response, error, _pool, _stacktrace)


def _is_number(text: str) -> bool:
    """True for a size of bytes that an object may have."""
    # isascii, since isdigit alone also holds for characters such as "²", which int() refuses; it refuses thousands of
    # digits, too.
    return text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS and int(text) <= MAX_OBJECT_BYTES


def _manager(url: Url) -> urllib3.PoolManager:
    """Make urllib3's connection pool for one request, through the environment's proxy if there is one."""
    proxy = proxy_for(str(url))
    context = tls_context() if url.is_tls else None
    if proxy is None:
        return urllib3.PoolManager(ssl_context=context)
    host = f"[{proxy.host}]" if ":" in proxy.host else proxy.host
    return urllib3.ProxyManager(f"http://{host}:{proxy.port}", proxy_headers=dict(proxy.headers), ssl_context=context)
