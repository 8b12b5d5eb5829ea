"""Servers of the benchmark: one nginx, with several ports over the same files.

For ``scripts/bench tail`` it has further ones, and fault servers of :mod:`mpreader.testing` run beside it.

The listening sockets are made here and inherited by nginx, as when its binary is upgraded. So another process can't
take their ports meanwhile, and the kernel paces the connections that are accepted on the port of ``slow90``. nginx's
own ``limit_rate`` would not do: it does not limit the first second of a request, and a part takes a tenth of that.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from mpreader.testing.certificate import LoopbackCertificate

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BYTES_PER_S", "DELAY_S", "Servers", "Site", "nginx_path", "spawned"]

BYTES_PER_S: Final = 90_000_000
DELAY_S: Final = 0.03
WORKERS: Final = 2  # processes of nginx
ADDRESSES: Final = tuple(f"127.0.0.{number}" for number in range(2, 6))
_SO_MAX_PACING_RATE: Final = 47  # Linux's number of the socket option; Python's socket module does not have it
_QUIET_S: Final = 0.02  # a log that has not grown for so long is taken to be complete
# Configuration of nginx. Clients keep their connections, however many requests they make.
_HTTP: Final = """\
{user}worker_processes {workers};
daemon off;
pid {folder}/pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
    default_type application/octet-stream;
    log_format line '$request_method $status $body_bytes_sent';
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    ssl_certificate {certificate.server_file};
    ssl_certificate_key {certificate.server_file};
    upstream delay {{ server 127.0.0.1:{delay_port}; keepalive 64; keepalive_requests 1000000000; }}
    split_clients $request_id $some_slow {{ 2% 200k; * 0; }}
    root {root};
{sites}}}
"""
_SITE: Final = """\
    server {{
{listen}
        access_log {log} line;
{extra}        location / {{ {location} }}
    }}
"""
_LATE: Final = """\
        location = /delay {
            internal;
            proxy_pass http://delay;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass_request_headers off;
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
        }
"""


@dataclass(frozen=True, slots=True)
class _Rules:
    """How one of nginx's servers behaves.

    Attributes:
        tls: True: it speaks https.
        bytes_per_s: Most bytes per second of one connection; None: no limit.
        location: nginx's directives for each response.
        extra: nginx's directives beside those.
        addresses: Addresses on which it listens, all with the same port.
        last: What is said of the last address in place of ``location``; "refuse": nothing listens there.
    """

    tls: bool = False
    bytes_per_s: int | None = None
    location: str = ""
    extra: str = ""
    addresses: tuple[str, ...] = ("127.0.0.1",)
    last: str = ""

    @property
    def listening(self) -> tuple[str, ...]:
        """The addresses that take connections."""
        return self.addresses[:-1] if self.last == "refuse" else self.addresses


_RULES: Final = {
    "plain": _Rules(),
    "tls": _Rules(tls=True),
    "slow90": _Rules(bytes_per_s=BYTES_PER_S),
    "late30": _Rules(location="auth_request /delay;", extra=_LATE),
    "far": _Rules(bytes_per_s=BYTES_PER_S, location="auth_request /delay;", extra=_LATE),
}
_TAIL_RULES: Final = {
    "some-slow": _Rules(bytes_per_s=BYTES_PER_S, location="limit_rate $some_slow;"),
    "all-slow": _Rules(location="limit_rate 200k;"),
    "addresses": _Rules(bytes_per_s=BYTES_PER_S, addresses=ADDRESSES),
    "address-slow": _Rules(bytes_per_s=BYTES_PER_S, addresses=ADDRESSES, last="limit_rate 200k;"),
    "address-refuses": _Rules(bytes_per_s=BYTES_PER_S, addresses=ADDRESSES, last="refuse"),
}
# A name of several addresses; the clients must be told of it.
_NAME: Final = "several.addresses.test"


@dataclass(frozen=True, slots=True)
class Site:
    """One of the servers.

    Attributes:
        name: Key of ``SERVERS``.
        endpoint_url: URL of the server.
        ca_file: PEM file of the authority that a client must trust; None: it speaks http.
        log: Log with a line for each request.
        addresses: What the host of the URL must resolve to; empty: it is an address.
    """

    name: str
    endpoint_url: str
    ca_file: Path | None
    log: Path
    addresses: tuple[str, ...] = ()

    @property
    def host(self) -> str:
        """Host of the URL."""
        return urlsplit(self.endpoint_url).hostname or ""

    def mark(self) -> int:
        """Position of the log's end, once nothing has been added to it for a moment.

        nginx logs a request after its last byte, which the client may have by then.
        """
        size = -1
        while size != (size := _size(self.log)):
            time.sleep(_QUIET_S)
        return size

    def served_since(self, mark: int) -> tuple[int, int]:
        """Requests that ended after ``mark``, and bytes of their bodies that were sent; 0 where they aren't logged."""
        end = self.mark()
        with self.log.open("rb") as log:
            log.seek(mark)
            lines = [line.split() for line in log.read(end - mark).splitlines()]
        return len(lines), sum(int(nbytes) for _, _, *counted in lines for nbytes in counted)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def nginx_path() -> str | None:
    """Path of nginx; None if it isn't installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Servers:
    """All servers. A context manager.

    Args:
        root: Folder that is served; the folders in it are the buckets.
        tail: Start those of ``scripts/bench tail``, too.

    Attributes:
        sites: The servers by name. Those with a tail by nginx are missing where it is not installed.
        kind: ``"nginx"``, or ``"FaultServer"`` if that is not installed.
        pid: Process of nginx, or of that server; it may have children.
    """

    def __init__(self, root: Path, *, tail: bool = False) -> None:
        self._root = root
        self._tail = tail
        self._stack = ExitStack()
        self.pid = 0
        self.kind = "nginx" if nginx_path() else "FaultServer"
        self.sites: dict[str, Site] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpreader-bench-")))
            if self.kind == "nginx":
                self._start_nginx(stack)
            else:
                self._start_fault_servers(stack, "usual")
            if self._tail:
                self._start_fault_servers(stack, "tail")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_nginx(self, stack: ExitStack) -> None:
        certificate = LoopbackCertificate()
        stack.callback(certificate.close)
        delay = _spawn(stack, [sys.executable, str(Path(__file__).with_name("delay.py")), str(DELAY_S)])
        rules = _RULES | (_TAIL_RULES if self._tail else {})
        sockets = {name: _listeners(each, stack) for name, each in rules.items()}
        self.sites |= {name: self._site(name, each, sockets[name][0], certificate) for name, each in rules.items()}
        configuration = _HTTP.format(
            # As root nginx gives its workers another user, who may not read a private folder.
            user="user root;\n" if os.geteuid() == 0 else "",
            workers=WORKERS,
            folder=self._folder,
            root=self._root,
            certificate=certificate,
            delay_port=_first_line(delay),
            sites="".join(_blocks(self.sites[name], each) for name, each in rules.items()),
        )
        file = self._folder / "nginx.conf"
        file.write_text(configuration)
        descriptors = [listener.fileno() for listeners in sockets.values() for listener in listeners]
        nginx = _spawn(
            stack,
            [nginx_path() or "nginx", "-c", str(file), "-e", str(self._folder / "error.log")],
            descriptors,
            # By this variable a running nginx hands its sockets over to the one that replaces it.
            {"NGINX": "".join(f"{descriptor};" for descriptor in descriptors)},
        )
        self.pid = nginx.pid
        self._wait_until_up()

    def _site(self, name: str, rules: _Rules, listener: socket.socket, certificate: LoopbackCertificate) -> Site:
        scheme, ca_file = ("https", certificate.ca_file) if rules.tls else ("http", None)
        [host], resolved = (rules.addresses, ()) if len(rules.addresses) == 1 else ([_NAME], rules.addresses)
        url = f"{scheme}://{host}:{listener.getsockname()[1]}"
        return Site(name, url, ca_file, self._folder / f"{name}.log", resolved)

    def _start_fault_servers(self, stack: ExitStack, which: str) -> None:
        script = Path(__file__).with_name("fault_servers.py")
        server = _spawn(stack, [sys.executable, str(script), which, str(self._root), str(self._folder)])
        self.pid = self.pid or server.pid
        for name, (url, ca_file) in json.loads(_first_line(server)).items():
            self.sites[name] = Site(name, url, Path(ca_file) if ca_file else None, self._folder / f"{name}.log")

    def _wait_until_up(self) -> None:
        # The sockets listen already, so that connecting proves nothing: a request waits until nginx is up, and fails if
        # nginx ends.
        port = int(self.sites["plain"].endpoint_url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.settimeout(10)
            connection.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            try:
                answered = connection.recv(1)
            except TimeoutError:
                answered = b""
        if not answered:
            raise RuntimeError(f"nginx did not start: {(self._folder / 'error.log').read_text()}")


def _listeners(rules: _Rules, stack: ExitStack) -> list[socket.socket]:
    """Listening sockets of a server, all with the same port."""
    port, listeners = 0, []
    for address in rules.addresses:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        port = listener.getsockname()[1]
        if rules.bytes_per_s is not None:
            # Accepted sockets inherit the option. TCP paces them by itself; no queueing discipline is needed.
            listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rules.bytes_per_s)
        listener.setblocking(False)  # as nginx expects: of two workers that call accept(), one would block
        if address in rules.listening:  # else it is bound only, so that no other process listens there
            listener.listen(1024)
            listeners.append(listener)
    return listeners


def _blocks(site: Site, rules: _Rules) -> str:
    """nginx's configuration of a server: where the last address answers in another way, it is a server of its own."""
    if rules.last and rules.listening == rules.addresses:
        *usual, last = rules.addresses
        return _block(site, rules, usual, rules.location) + _block(site, rules, [last], rules.last)
    return _block(site, rules, rules.listening, rules.location)


def _block(site: Site, rules: _Rules, addresses: Iterable[str], location: str) -> str:
    port = urlsplit(site.endpoint_url).port
    listen = "\n".join(f"        listen {address}:{port}{' ssl' if rules.tls else ''};" for address in addresses)
    return _SITE.format(listen=listen, log=site.log, location=location, extra=rules.extra)


@contextmanager
def spawned(command: list[str]) -> Iterator[str]:
    """Start a server; yields the line that it prints when it is ready, and ends it with the block."""
    with ExitStack() as stack:
        yield _first_line(_spawn(stack, command))


def _spawn(
    stack: ExitStack,
    command: list[str],
    descriptors: list[int] | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors or (),
        env=os.environ | (environment or {}),
        text=True,
        start_new_session=True,  # else Ctrl-C would end the server before its clients
    )
    stack.callback(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _first_line(process: subprocess.Popen[str]) -> str:
    line = process.stdout.readline() if process.stdout is not None else ""
    if not line:
        raise RuntimeError("a server ended before it was ready")
    return line.strip()
