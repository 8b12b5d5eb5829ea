"""Routes: how a worker reaches the bytes of an object, through which proxy and with which certificates.

Made by the sources in the main process and sent to the workers. Named tuples, not dataclasses: a worker starts faster
without :mod:`dataclasses`.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Proxy", "Route"]


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
