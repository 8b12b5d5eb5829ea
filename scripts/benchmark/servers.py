"""Servers of the benchmark: one nginx, four ports over the same files.

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
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mpreader.testing.certificate import LoopbackCertificate

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BYTES_PER_S", "DELAY_S", "Servers", "Site", "nginx_path"]

BYTES_PER_S: Final = 90_000_000
DELAY_S: Final = 0.03
WORKERS: Final = 2  # processes of nginx
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
    log_format line '$request_method $status $bytes_sent';
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    ssl_certificate {certificate.server_file};
    ssl_certificate_key {certificate.server_file};
    upstream delay {{ server 127.0.0.1:{delay_port}; keepalive 64; keepalive_requests 1000000000; }}
    root {root};
{sites}}}
"""
_SITE: Final = """\
    server {{
        listen 127.0.0.1:{port}{options};
        access_log {log} line;
{extra}        location / {{ {rules} }}
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
class Site:
    """One of the servers.

    Attributes:
        name: Key of ``SERVERS``.
        endpoint_url: URL of the server.
        ca_file: PEM file of the authority that a client must trust; None: it speaks http.
        log: Log with a line for each request.
    """

    name: str
    endpoint_url: str
    ca_file: Path | None
    log: Path

    def mark(self) -> int:
        """Position of the log's end, once nothing has been added to it for a moment.

        nginx logs a request after its last byte, which the client may have by then.
        """
        size = -1
        while size != (size := _size(self.log)):
            time.sleep(_QUIET_S)
        return size

    def requests_since(self, mark: int) -> int:
        """Requests that ended after ``mark``."""
        end = self.mark()
        with self.log.open("rb") as log:
            log.seek(mark)
            return log.read(end - mark).count(b"\n")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def nginx_path() -> str | None:
    """Path of nginx; None if it isn't installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Servers:
    """All servers. A context manager.

    Args:
        root: Folder that is served; the folders in it are the buckets.

    Attributes:
        sites: The servers by name.
        kind: ``"nginx"``, or ``"FaultServer"`` if that is not installed.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stack = ExitStack()
        self.kind = "nginx" if nginx_path() else "FaultServer"
        self.sites: dict[str, Site] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpreader-bench-")))
            if self.kind == "nginx":
                self._start_nginx(stack)
            else:
                self._start_fallback(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_nginx(self, stack: ExitStack) -> None:
        certificate = LoopbackCertificate()
        stack.callback(certificate.close)
        delay = _spawn(stack, [sys.executable, str(Path(__file__).with_name("delay.py")), str(DELAY_S)])
        sockets = {name: stack.enter_context(_listener(name)) for name in ("plain", "tls", "slow90", "late30")}
        self.sites = {name: self._site(name, listener, certificate) for name, listener in sockets.items()}
        configuration = _HTTP.format(
            # As root nginx gives its workers another user, who may not read a private folder.
            user="user root;\n" if os.geteuid() == 0 else "",
            workers=WORKERS,
            folder=self._folder,
            root=self._root,
            certificate=certificate,
            delay_port=_first_line(delay),
            sites="".join(_site_block(site) for site in self.sites.values()),
        )
        file = self._folder / "nginx.conf"
        file.write_text(configuration)
        descriptors = [listener.fileno() for listener in sockets.values()]
        _spawn(
            stack,
            [nginx_path() or "nginx", "-c", str(file), "-e", str(self._folder / "error.log")],
            descriptors,
            # By this variable a running nginx hands its sockets over to the one that replaces it.
            {"NGINX": "".join(f"{descriptor};" for descriptor in descriptors)},
        )
        self._wait_until_up()

    def _site(self, name: str, listener: socket.socket, certificate: LoopbackCertificate) -> Site:
        scheme, ca_file = ("https", certificate.ca_file) if name == "tls" else ("http", None)
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        return Site(name, url, ca_file, self._folder / f"{name}.log")

    def _start_fallback(self, stack: ExitStack) -> None:
        script = Path(__file__).with_name("fallback.py")
        server = _spawn(stack, [sys.executable, str(script), str(self._root), str(self._folder)])
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


def _listener(name: str) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listener.setblocking(False)  # as nginx expects: of two workers that call accept(), one would block
    if name == "slow90":
        # Accepted sockets inherit the option. TCP paces them by itself; no queueing discipline is needed.
        listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, BYTES_PER_S)
    return listener


def _site_block(site: Site) -> str:
    port = site.endpoint_url.rpartition(":")[2]
    rules, extra = ("auth_request /delay;", _LATE) if site.name == "late30" else ("", "")
    return _SITE.format(port=port, options=" ssl" if site.ca_file else "", log=site.log, rules=rules, extra=extra)


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
