"""Opening of a socket to a server: address lookup, TCP, the tunnel through a proxy, TLS.

Used by :mod:`~mpreader.pool.worker.connection`, which owns the socket then. It must not send a request to the server
itself, and keeps no state but the TLS contexts and the addresses, which all threads of a worker share.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING, Final

from mpreader.pool.worker.addresses import Address, Addresses
from mpreader.pool.worker.http import HttpSocket
from mpreader.pool.worker.route import Proxy, Route

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

__all__ = ["address_of", "addresses", "host_and_port", "open_socket", "server_of"]

# TLS contexts by the route's ca_file. They are kept because making one parses every certificate authority of the
# system, which takes 20 ms. No lock: entries are only added, and two threads that make the same context do no harm.
_tls_contexts: Final[dict[str | None, ssl.SSLContext]] = {}
addresses: Final = Addresses()


def open_socket(
    route: Route,
    connect_timeout_s: float,
    io_timeout_s: float,
    announce: Callable[[socket.socket], None] = lambda _: None,
) -> socket.socket:
    """Connect to a route's server.

    A host may have several addresses, as S3's have. The connections spread over them, and an address that failed or was
    slow lately is left alone for a while, as long as there are others.

    Args:
        route: Server, proxy and certificate authorities.
        connect_timeout_s: Longest wait for each step of connecting.
        io_timeout_s: Longest time that a later receive or send may block.
        announce: Is called with each socket before it connects, so that another thread can shut it down meanwhile.

    Returns:
        A socket in blocking mode, owned by the caller.

    Raises:
        OSError: No connection; ``ssl`` errors are among these.
        MalformedResponse: The proxy does not speak HTTP/1.1.
        ValueError: The host's name, or a header for the proxy, can't be sent.
    """
    sock = _connect(*server_of(route), connect_timeout_s, announce)
    address = address_of(sock)  # now: of a connection that was reset it is not known any more
    try:
        if route.proxy is not None and route.tls:
            _request_tunnel(sock, route, route.proxy)
        if route.tls:
            context = _tls_context(route.ca_file)
            sock = context.wrap_socket(sock, server_hostname=route.host, do_handshake_on_connect=False)
            announce(sock)
            sock.do_handshake()
        _block_in_kernel(sock, io_timeout_s)
    except BaseException as error:
        if isinstance(error, OSError):
            addresses.struck(address)
        sock.close()  # it has no other owner yet
        raise
    return sock


def address_of(sock: socket.socket) -> Address | None:
    """Address that a socket is connected to; None if it is not any more."""
    try:
        address: Address = sock.getpeername()
    except OSError:
        return None
    return address


def server_of(route: Route) -> tuple[str, int]:
    """Host and port to connect to: those of the proxy, where there is one."""
    return (route.host, route.port) if route.proxy is None else (route.proxy.host, route.proxy.port)


def host_and_port(route: Route) -> str:
    """Write the server of a route as in a URL: an IPv6 address in brackets, then the port."""
    host = f"[{route.host}]" if ":" in route.host else route.host
    return f"{host}:{route.port}"


def _connect(host: str, port: int, timeout_s: float, announce: Callable[[socket.socket], None]) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    last_error: OSError = OSError(f"no address for {host}")
    for family, kind, protocol, _, address in addresses.ordered(host, port, found):
        sock = socket.socket(family, kind, protocol)
        try:
            announce(sock)  # outside of _try_connect: whoever raises in it wants no other address to be tried
            last_error = _try_connect(sock, address, timeout_s) or last_error
        except BaseException:
            sock.close()
            raise
        if sock.fileno() >= 0:
            return sock
    raise last_error


def _try_connect(sock: socket.socket, address: Address, timeout_s: float) -> OSError | None:
    """Connect a socket; if that fails, close it, prefer other addresses from now on, and return the error."""
    try:
        sock.settimeout(timeout_s)
        sock.connect(address)
        # A request must not wait until the server has acknowledged earlier packets.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        sock.close()
        addresses.refused(address)
        return error
    return None


def _request_tunnel(sock: socket.socket, route: Route, proxy: Proxy) -> None:
    # This HttpSocket is dropped afterwards, with all bytes in its buffer. There are none: in TLS the client sends the
    # first message, so nothing can follow the proxy's response before that.
    http = HttpSocket(sock)
    http.send_request("CONNECT", host_and_port(route), [("Host", host_and_port(route)), *proxy.headers])
    response = http.read_response()
    if response.status != 200:
        raise OSError(f"the proxy refuses to connect: HTTP {response.status}")


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    import ssl  # only here: it would add 10 ms to the start of a worker that never needs it

    context = _tls_contexts.get(ca_file)
    if context is None:
        if ca_file is None:
            context = ssl.create_default_context()
        else:
            # Verifies certificate and host name, like the default context, but trusts nothing except ca_file.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            if os.path.isdir(ca_file):
                context.load_verify_locations(capath=ca_file)
            else:
                context.load_verify_locations(cafile=ca_file)
        _tls_contexts[ca_file] = context
    return context


def _block_in_kernel(sock: socket.socket, timeout_s: float) -> None:
    """Make the kernel end a receive or send that blocks too long.

    Python's own timeout is not used, since it adds a system call (poll) before every receive. This timeout is the last
    resort, for the case that the watch on a connection's deadline fails.
    """
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))  # struct timeval: seconds, microseconds
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.settimeout(None)  # ends the timeout of connecting: from here on the socket blocks
