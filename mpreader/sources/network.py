"""Network settings of the environment, namely proxies and certificate authorities, and the routes made of them.

Used by both kinds of sources and by the doctor. It only reads the environment, and must not make requests. Workers see
none of these variables: all that they need of them is in their routes.
"""

from __future__ import annotations

import base64
import os
import re
import ssl
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from mpreader.errors import ConfigError
from mpreader.pool.worker.route import Proxy, Route

__all__ = [
    "PORTS",
    "Headers",
    "basic_authorization",
    "ca_file",
    "checked_headers",
    "proxy_for",
    "route_to",
    "tls_context",
]

Headers = tuple[tuple[str, str], ...]  # names and values, in the order in which they are sent

PORTS: Final = {"http": 80, "https": 443}  # default port of each scheme

# Headers by which a request says which bytes it wants, or how they are framed.
_OWN_HEADERS: Final = frozenset(
    {"accept-encoding", "connection", "content-length", "host", "if-match", "range", "transfer-encoding"}
)


def checked_headers(headers: Mapping[str, str] | None) -> Headers:
    """Check headers that a user wants to be sent.

    Raises:
        ConfigError: A name or a value can't be sent, or the header is one that mpreader sends itself. The value, which
            may be a secret, is not shown.
    """
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise ConfigError(f"not the name of a header: {name!r}")
        if name.lower() in _OWN_HEADERS:
            raise ConfigError(f"the header {name} is sent by mpreader itself")
        if not isinstance(value, str) or not re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value):
            raise ConfigError(f"the value of the header {name} must be text of printable Latin-1 characters")
    return tuple((headers or {}).items())


def route_to(url: str, headers: Headers, proxy: Proxy | None, ca_file: str | None) -> Route:
    """Make the route to a URL.

    Args:
        url: The URL, percent-encoded, without user name and fragment.
        headers: Headers that every request must carry, except ``Host``, which is added here.
        proxy: Proxy to go through, or None.
        ca_file: File, or folder, of the certificate authorities to trust; None: the system's.
    """
    parts = urlsplit(url)
    port = parts.port or PORTS[parts.scheme]
    is_default = port == PORTS[parts.scheme]
    # The Host header must be the one that was signed: botocore leaves a default port out, even where the URL names it.
    host = parts.netloc.rpartition(":")[0] if is_default and parts.port else parts.netloc
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    return Route(
        parts.scheme == "https", parts.hostname or "", port, target, (("Host", host), *headers), proxy, ca_file
    )


def proxy_for(url: str) -> Proxy | None:
    """Return the proxy that the environment names for ``url``; None if it names none, or excludes the host.

    Raises:
        ConfigError: The proxy is of a kind that the workers can't use.
    """
    parts = urlsplit(url)
    proxy_url = getproxies().get(parts.scheme)
    if not proxy_url or proxy_bypass(parts.netloc):
        return None
    if "://" not in proxy_url:  # many environments name host:port only
        proxy_url = "http://" + proxy_url.removeprefix("//")
    proxy = urlsplit(proxy_url)
    # The workers can only connect to a proxy by plain HTTP, and then use TLS through it. SOCKS and https:// proxies
    # would need more code there.
    if proxy.scheme != "http" or not proxy.hostname:
        name = f"{parts.scheme.upper()}_PROXY"
        raise ConfigError(f"{name} names a proxy of the kind {proxy.scheme}://; only http://host:port can be used")
    headers: Headers = ()
    if proxy.username is not None:
        headers = (("Proxy-Authorization", basic_authorization(proxy.username, proxy.password or "")),)
    return Proxy(proxy.hostname, proxy.port or 80, headers)


def ca_file() -> str | None:
    """Return the file, or folder, of certificate authorities that the environment names; None: the system's.

    The variables are those of requests and of OpenSSL; the first one that is set and not empty counts.
    """
    return os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE") or None


def tls_context() -> ssl.SSLContext:
    """Make a TLS context that trusts the authorities of :func:`ca_file`.

    Raises:
        ConfigError: The file or folder can't be read.
    """
    path = ca_file()
    try:
        if path is not None and os.path.isdir(path):
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"can't read the certificates in {path}: {error}; check REQUESTS_CA_BUNDLE and SSL_CERT_FILE"
        ) from error


def basic_authorization(user: str, password: str) -> str:
    """Make the value of a header for basic authentication.

    Args:
        user: User name, percent-encoded as in a URL.
        password: Password, percent-encoded as in a URL.
    """
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
