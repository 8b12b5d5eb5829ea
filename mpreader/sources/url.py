"""URLs of web servers, taken apart: server, request target and password; and redirects, which lead from one to another.

Used by :mod:`mpreader.sources.http`. Pure. No error and no repr may show a URL's query, user name or password, since
these may be secrets.
"""

from __future__ import annotations

import contextlib
import re
from typing import NamedTuple
from urllib.parse import urljoin

import urllib3
from urllib3.util import parse_url

from mpreader.errors import ConfigError
from mpreader.sources.network import PORTS, Headers, basic_authorization

__all__ = ["Url", "without_urls"]


class Url(NamedTuple):
    """Parts of an http(s) URL, percent-encoded. A secret: ``target`` may hold a signature, ``headers`` a password.

    Attributes:
        scheme: ``"http"`` or ``"https"``.
        authority: Host, with its port where that is not the default one; without user name and password.
        target: Path and query.
        headers: The Authorization header made of the URL's user name and password, and headers that the user gave.
    """

    scheme: str
    authority: str
    target: str
    headers: Headers

    @classmethod
    def parse(cls, text: str) -> Url:
        """Split a URL into its parts.

        Raises:
            ConfigError: ``text`` is not an http(s) URL; the error does not show its secrets.
        """
        if not isinstance(text, str) or not re.match(r"https?://", text, re.IGNORECASE):
            raise ConfigError(f"not an http(s) URL: {without_urls(text)!r}")
        try:
            url = parse_url(text)
        except urllib3.exceptions.LocationParseError:
            raise ConfigError(f"malformed URL: {without_urls(text)!r}") from None
        if not url.host:
            raise ConfigError(f"no host in the URL {without_urls(text)!r}")
        scheme = str(url.scheme)
        port = "" if url.port in (None, PORTS[scheme]) else f":{url.port}"
        headers: Headers = ()
        if url.auth is not None:
            user, _, password = url.auth.partition(":")
            headers = (("Authorization", basic_authorization(user, password)),)
        return cls(scheme, url.host + port, url.request_uri, headers)

    def redirected(self, location: str) -> Url:
        """Return the URL that a redirect leads to, with the password only if it is on the same server.

        Args:
            location: Value of the redirect's Location header, relative or absolute.
        """
        # urllib3 reads headers as Latin-1; many servers send other letters in UTF-8, without percent-encoding them.
        with contextlib.suppress(UnicodeError):
            location = location.encode("latin-1").decode()
        url = Url.parse(urljoin(str(self), location))
        same = (url.scheme, url.authority) == (self.scheme, self.authority)
        return url._replace(headers=self.headers) if same and not url.headers else url

    @property
    def path(self) -> str:
        """Path without the query, percent-encoded."""
        return self.target.partition("?")[0]

    @property
    def is_tls(self) -> bool:
        """True for https."""
        return self.scheme == "https"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    def __repr__(self) -> str:
        # The repr of a named tuple would show the query and the password in tracebacks.
        return f"<Url {self.scheme}://{self.authority}{self.path}>"


def without_urls(text: object) -> str:
    """Return ``text`` without user names, passwords and queries of the URLs in it, which may be secrets."""
    return re.sub(r"//[^/@\s]*@|\?\S*", lambda hit: "//…@" if hit[0].startswith("//") else "?…", str(text))
