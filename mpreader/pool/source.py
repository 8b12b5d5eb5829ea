"""What the pool must know of an object: which version to read, and how a worker gets to it.

A source lives in the main process; only its routes are sent to the workers. Credentials never are.

Named tuples, not dataclasses: the workers import this, and start faster without :mod:`dataclasses`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

__all__ = ["ObjectVersion", "Proxy", "Route", "Source"]


class ObjectVersion(NamedTuple):
    """The one version of an object that a load reads.

    Attributes:
        size: Bytes of the whole object.
        etag: ETag as the server wrote it, quotes included; "" where the server gives none.
    """

    size: int
    etag: str


class Proxy(NamedTuple):
    """An HTTP proxy on the way: plain requests name the whole URL, TLS goes through a CONNECT tunnel.

    Attributes:
        host: Proxy's name or address, without brackets or port.
        port: Proxy's TCP port.
        headers: Headers for the proxy alone, such as Proxy-Authorization. A secret.
    """

    host: str
    port: int
    headers: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port})"


class Route(NamedTuple):
    """How a worker asks for bytes of an object. A secret: whoever has it can read the object.

    Attributes:
        tls: Whether to speak https.
        host: Server's name or address, without brackets or port.
        port: Server's TCP port.
        target: Request target: path and query, percent-encoded, presigned where it must be.
        headers: Further headers that every request must carry, ``Host`` included; not Range and If-Match.
        proxy: Proxy to go through, or None.
        ca_file: PEM file, or directory, of the certificate authorities to trust; None: the system's.
    """

    tls: bool
    host: str
    port: int
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    proxy: Proxy | None = None
    ca_file: str | None = None

    def __repr__(self) -> str:
        return f"Route({self.host}:{self.port})"


class Source(Protocol):
    """One object, opened lazily. Methods may block on the network and are called from threads of the pool."""

    @property
    def bucket(self) -> str:
        """Bucket, or host of an http(s) source; named in errors."""

    @property
    def key(self) -> str:
        """Key, or path of an http(s) source; named in errors."""

    @property
    def uri(self) -> str:
        """What people call it, ``s3://bucket/key`` or the URL without its secrets; begins the errors' messages."""

    @property
    def max_attempts(self) -> int:
        """Requests made for the same bytes before giving up."""

    def open(self) -> ObjectVersion:
        """Ask the server, once, which version there is now.

        Raises:
            TransportError: It could not be found out (ObjectMissing, AccessDenied, …).
        """

    def route(self) -> Route:
        """Make a fresh route, with fresh signature and credentials.

        Raises:
            TransportError: There are no credentials, or they could not be renewed.
        """
