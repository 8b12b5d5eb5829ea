"""Routes: server, request target, proxy and certificate authorities by which the bytes of an object are requested.

Made by :mod:`mpreader.sources` in the main process, sent to the workers inside of Fetch messages, and used there to
open connections and to write requests. A route must hold no credentials but those signed into its target or headers.
Routes are named tuples, not dataclasses: a worker starts faster without importing :mod:`dataclasses`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Proxy", "Route"]


class Proxy(NamedTuple):
    """HTTP proxy between a worker and a server: plain requests name the whole URL, TLS goes through a CONNECT tunnel.

    Attributes:
        host: Proxy's name or address, without brackets or port.
        port: Proxy's TCP port.
        headers: Headers for the proxy alone, such as Proxy-Authorization. A secret.
    """

    host: str
    port: int
    headers: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        # The repr of a named tuple would show the password in logs and tracebacks.
        return f"Proxy({self.host}:{self.port})"


class Route(NamedTuple):
    """Address of an object for a worker. A secret: whoever knows it can read the object until its signature expires.

    Attributes:
        tls: True for https.
        host: Server's name or address, without brackets or port.
        port: Server's TCP port.
        target: Request target: path and query, percent-encoded, presigned where it must be.
        headers: Further headers that every request must carry, ``Host`` included; not Range and If-Match.
        proxy: Proxy to go through, or None.
        ca_file: PEM file, or directory, of the certificate authorities to trust; None: the system's. Only used if
            ``tls`` is True.
    """

    tls: bool
    host: str
    port: int
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    proxy: Proxy | None = None
    ca_file: str | None = None

    def __repr__(self) -> str:
        # The repr of a named tuple would show the presigned target.
        return f"Route({self.host}:{self.port})"
