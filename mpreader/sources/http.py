"""HttpSource: an object behind any http(s) URL as a source of the pool.

It asks in the main process, by urllib3, for the object's size and version, and follows redirects: the workers, which
speak HTTP by code of their own, get a route to the URL at the end of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import urljoin

import urllib3
from urllib3.util import Retry, Timeout, parse_url

from mpreader.errors import AccessDenied, ConfigError, ObjectMissing, TransportError
from mpreader.pool.source import ObjectVersion
from mpreader.pool.worker.route import Route
from mpreader.sources.network import PORTS, Headers, basic_authorization, ca_file, proxy_for, route_to, tls_context

__all__ = ["HttpSource"]

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS: Final = 10
# Responses to a HEAD after which a GET is tried: some servers refuse HEAD or leave out the size, and URLs that are
# presigned for GET are good for nothing else.
_TRY_GET_AFTER: Final = frozenset({200, 400, 401, 403, 405, 501})
_BUSY: Final = (408, 429, 500, 502, 503, 504)
_TIMEOUT: Final = Timeout(connect=10, read=60)
_DENIED: Final = (
    "access denied: the URL may have expired, or need a user name and password (https://user:password@host/…)"
)


class HttpSource:
    """The object behind an http(s) URL. See :class:`mpreader.pool.source.Source`.

    Redirects are followed when it is opened; the workers ask the server that they lead to. A user name and password
    in the URL are sent as basic authentication, to the URL's own server only. Proxies are those of ``HTTP_PROXY``,
    ``HTTPS_PROXY`` and ``NO_PROXY``; certificate authorities those of ``REQUESTS_CA_BUNDLE`` or ``SSL_CERT_FILE``,
    else the system's.

    Args:
        url: The URL; its fragment is ignored.
        max_attempts: Requests made for the same bytes before giving up.

    Raises:
        ConfigError: ``url`` is not an http(s) URL.
    """

    version: ObjectVersion | None = None

    def __init__(self, url: str, max_attempts: int = 10) -> None:
        self._url = _Url.parse(url)
        self._max_attempts = max_attempts
        self._unused_target: _Url | None = None  # where redirects led in open(), until a route is made of it

    @property
    def bucket(self) -> str:
        """The URL's host."""
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
        """Requests made for the same bytes before giving up."""
        return self._max_attempts

    def open(self) -> ObjectVersion:
        """Follow redirects, and ask the server at their end for the version that there is now.

        Raises:
            ObjectMissing: There is nothing at the URL.
            AccessDenied: The server refuses.
            TransportError: The server can't be reached, or serves no ranges of a known size.
        """
        self._unused_target, version = self._resolve()
        return version

    def route(self) -> Route:
        """Make a route to the URL that redirects end at; only the first one after ``open`` follows none anew.

        Raises:
            TransportError: As for :meth:`open`.
        """
        # A redirect may lead to a URL that expires, and a new route is asked for when the old one may have.
        target, self._unused_target = self._unused_target, None
        if target is None:
            target, _ = self._resolve()
        return route_to(str(target), target.headers, proxy_for(str(target)), ca_file() if target.is_tls else None)

    def __repr__(self) -> str:
        return f"<HttpSource {self.uri}>"

    def _resolve(self) -> tuple[_Url, ObjectVersion]:
        """Return the URL that redirects end at, and the version there."""
        target, status, headers = self._follow("HEAD", self._url, {})
        if status == 200 and "Content-Length" in headers:
            return target, ObjectVersion(self._size(headers["Content-Length"], headers), _etag(headers))
        if status in _TRY_GET_AFTER:
            target, status, headers = self._follow("GET", self._url, {"Range": "bytes=0-0"})
        # An empty object has no first byte: 416, with its size in Content-Range all the same.
        if status not in (206, 416):
            raise self._refusal(status)
        _, _, total = headers.get("Content-Range", "").rpartition("/")
        return target, ObjectVersion(self._size(total, headers), _etag(headers))

    def _follow(self, method: str, url: _Url, headers: dict[str, str]) -> tuple[_Url, int, Mapping[str, str]]:
        """Make a request and follow its redirects; return the last URL, with status and headers of its response."""
        for _ in range(_MAX_REDIRECTS):
            status, response_headers = self._request(method, url, headers)
            location = response_headers.get("Location")
            if status not in _REDIRECTS or location is None:
                return url, status, response_headers
            try:
                url = url.redirected(location)
            except ConfigError as error:
                raise self._error(TransportError, f"a redirect can't be followed: {error}") from None
        raise self._error(TransportError, f"more than {_MAX_REDIRECTS} redirects")

    def _request(self, method: str, url: _Url, headers: dict[str, str]) -> tuple[int, Mapping[str, str]]:
        """Return status and headers of the response; what may be transient is tried again first."""
        # The response to a HEAD is that of the GET without its body, compression included: ask for none.
        all_headers = {"Accept-Encoding": "identity", **dict(url.headers), **headers}
        retries = Retry(
            self._max_attempts - 1,
            other=0,  # a certificate does not get better
            redirect=False,  # _follow does it, which keeps the password from other servers
            status_forcelist=_BUSY,
            raise_on_status=False,  # _refusal explains it
            respect_retry_after_header=False,  # it may name an hour
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
                response.close()  # the body may be the whole object
        except (urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "reason", None) or error
            # The cause is not shown: its text holds the URL with its query, which may be a secret.
            raise self._error(TransportError, f"no answer from {url.authority}: {_without_urls(reason)}") from None
        return response.status, response.headers

    def _size(self, text: str, headers: Mapping[str, str]) -> int:
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self._error(TransportError, "the server compresses it; ranges of that can't be read")
        if headers.get("Accept-Ranges") == "none":
            raise self._error(TransportError, "the server serves no ranges of it")
        if not text.isascii() or not text.isdigit():
            raise self._error(TransportError, "the server does not tell its size")
        return int(text)

    def _refusal(self, status: int) -> TransportError:
        if status in (401, 403, 407):
            return self._error(AccessDenied, f"{_DENIED} (HTTP {status})")
        if status in (404, 410):
            return self._error(ObjectMissing, f"there is nothing at this URL (HTTP {status})")
        if status == 200:
            return self._error(TransportError, "the server serves no ranges of it, only the whole")
        return self._error(TransportError, f"the server answers HTTP {status}")

    def _error(self, kind: type[TransportError], message: str) -> TransportError:
        return kind(f"{self.uri}: {message}", bucket=self.bucket, key=self.key, attempts=1)


class _Url(NamedTuple):
    """Parts of an http(s) URL, percent-encoded. A secret: ``target`` may hold a signature, ``headers`` a password.

    Attributes:
        scheme: ``"http"`` or ``"https"``.
        authority: Host, with its port where that is not the usual one; without user name and password.
        target: Path and query.
        headers: The Authorization header of the URL's user name and password, if it has any.
    """

    scheme: str
    authority: str
    target: str
    headers: Headers

    @classmethod
    def parse(cls, text: str) -> _Url:
        if not isinstance(text, str) or not re.match(r"https?://", text, re.IGNORECASE):
            raise ConfigError(f"not an http(s) URL: {_without_urls(text)!r}")
        try:
            url = parse_url(text)
        except urllib3.exceptions.LocationParseError:
            raise ConfigError(f"malformed URL: {_without_urls(text)!r}") from None
        if not url.host:
            raise ConfigError(f"no host in the URL {_without_urls(text)!r}")
        scheme = str(url.scheme)
        port = "" if url.port in (None, PORTS[scheme]) else f":{url.port}"
        headers: Headers = ()
        if url.auth is not None:
            user, _, password = url.auth.partition(":")
            headers = (("Authorization", basic_authorization(user, password)),)
        return cls(scheme, url.host + port, url.request_uri, headers)

    def redirected(self, location: str) -> _Url:
        """Return the URL that a redirect leads to; its headers are sent on within the same server only."""
        url = _Url.parse(urljoin(str(self), location))
        same = (url.scheme, url.authority) == (self.scheme, self.authority)
        return url._replace(headers=self.headers) if same and not url.headers else url

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def is_tls(self) -> bool:
        return self.scheme == "https"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    def __repr__(self) -> str:
        return f"<_Url {self.scheme}://{self.authority}{self.path}>"


def _manager(url: _Url) -> urllib3.PoolManager:
    """Make the connection pool for one request, through the environment's proxy if there is one."""
    proxy = proxy_for(str(url))
    context = tls_context() if url.is_tls else None
    if proxy is None:
        return urllib3.PoolManager(ssl_context=context)
    host = f"[{proxy.host}]" if ":" in proxy.host else proxy.host
    return urllib3.ProxyManager(f"http://{host}:{proxy.port}", proxy_headers=dict(proxy.headers), ssl_context=context)


def _etag(headers: Mapping[str, str]) -> str:
    etag = headers.get("ETag", "")
    # If-Match never holds for a weak ETag: the object counts as one that has none.
    return "" if etag.startswith("W/") else etag


def _without_urls(text: object) -> str:
    """Return ``text`` without user names and queries of the URLs in it: they may be secrets."""
    return re.sub(r"//[^/@\s]*@|\?\S*", lambda hit: "//…@" if hit[0].startswith("//") else "?…", str(text))
