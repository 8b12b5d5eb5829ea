"""OpenStack Swift with its S3 interface, from Debian's packages, in one temporary folder and on the loopback address.

There is one proxy for http, one for https (with the same objects), an account, a container and an object server, and
memcached, which Swift's authentication wants. All of them end with the ``with`` block, and the folder goes.
"""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mpreader.testing.certificate import LoopbackCertificate

if TYPE_CHECKING:
    from typing_extensions import Self

PACKAGES: Final = ("swift-proxy", "swift-account", "swift-container", "swift-object", "memcached")
DOMAIN: Final = "s3.mpreader.test"  # of buckets in host names
REGION: Final = "us-east-1"
ACCESS_KEY, SECRET_KEY = "test:tester", "testing-secret"
START_S: Final = 30

# Debian's own interpreter has Debian's packages. The servers take the path of swift.conf from nothing but this module.
_RUN: Final = """\
import sys
from swift.common import utils
utils.SWIFT_CONF_FILE = sys.argv[1]
from swift.common.wsgi import run_wsgi
sys.exit(run_wsgi(sys.argv[2], sys.argv[3]))
"""
_PYTHON: Final = "/usr/bin/python3"

_STORAGE: Final = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
workers = 0
log_level = ERROR
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
_PROXY: Final = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {folder}
workers = 0
log_level = ERROR
{tls}
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats bulk s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{memcached}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
location = {region}
storage_domain = {domain}
dns_compliant_bucket_names = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""


def missing_packages() -> list[str]:
    """The packages that must be installed before a Swift can be made."""
    programs = {f"swift-{kind}": f"swift-{kind}-server" for kind in ("proxy", "account", "container", "object")}
    programs["memcached"] = "memcached"
    return [package for package, program in programs.items() if shutil.which(program) is None]


class Swift:
    """A running Swift. Use it as a context manager.

    Attributes:
        url: URL of the http proxy.
        tls_url: URL of the https proxy; its authority is in ``ca_file``.
        version: Version of Swift.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="mpreader-swift-"))
        self._certificate = LoopbackCertificate()
        self.ca_file = self._certificate.ca_file
        names = ("proxy", "tls", "account", "container", "object", "memcached")
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self.url = f"http://127.0.0.1:{self._ports['proxy']}"
        self.tls_url = f"https://127.0.0.1:{self._ports['tls']}"
        try:
            self._configure()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # noqa: PERF203
                process.kill()
                process.wait()
        self._certificate.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def log(self) -> str:
        """What the servers have written."""
        return (self._folder / "log").read_text(errors="replace")

    def _configure(self) -> None:
        (self._folder / "devices/d1").mkdir(parents=True)
        (self._folder / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = suffix\n")
        common = {"folder": self._folder, "user": getpass.getuser(), "memcached": self._ports["memcached"]}
        for kind in ("account", "container", "object"):
            self._write(kind, _STORAGE.format(kind=kind, port=self._ports[kind], **common))
            self._make_ring(kind)
        pem = self._certificate.server_file
        for name, tls in (("proxy", ""), ("tls", f"cert_file = {pem}\nkey_file = {pem}")):
            text = _PROXY.format(
                port=self._ports[name], tls=tls, region=REGION, domain=DOMAIN, secret=SECRET_KEY, **common
            )
            self._write(name, text)

    def _write(self, name: str, text: str) -> None:
        (self._folder / f"{name}.conf").write_text(text)

    def _make_ring(self, kind: str) -> None:
        builder = self._folder / f"{kind}.builder"
        for arguments in (["create", "4", "1", "1"], ["add", f"r1z1-127.0.0.1:{self._ports[kind]}/d1", "1"]):
            subprocess.run(["swift-ring-builder", builder, *arguments], check=True, capture_output=True)
        # Its status is 1 where there is nothing to balance, as with a single device.
        subprocess.run(["swift-ring-builder", builder, "rebalance"], check=False, capture_output=True)

    def _start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            commands = [["memcached", "-l", "127.0.0.1", "-p", str(self._ports["memcached"]), "-u", getpass.getuser()]]
            for name in ("account", "container", "object", "proxy", "tls"):
                conf = str(self._folder / f"{name}.conf")
                application = "proxy-server" if name in {"proxy", "tls"} else f"{name}-server"
                commands.append([_PYTHON, "-c", _RUN, str(self._folder / "swift.conf"), conf, application])
            environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
            for command in commands:
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
                )
        self._await()

    def _await(self) -> None:
        """Wait until all servers listen."""
        deadline = time.monotonic() + START_S
        for port in self._ports.values():
            while not _listens(port):
                ended = [process for process in self._processes if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    raise RuntimeError(f"Swift has not started: {self.log()[-3000:]}")
                time.sleep(0.1)
        self.version = _version()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _version() -> str:
    command = [_PYTHON, "-c", "import swift; print(swift.__version__)"]
    return subprocess.check_output(command, text=True).strip()
