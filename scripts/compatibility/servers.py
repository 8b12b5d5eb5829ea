"""Checks of mpreader against a real server: OpenStack Swift with its S3 interface, which checks signatures.

  scripts/servers                    every check, one line each; nonzero exit status if one fails
  scripts/servers --install          installs the Debian packages that are missing first (as root)
  scripts/servers key https          the checks whose names hold one of these words

Swift runs in a temporary folder, on the loopback address, without configuration of the host's, and is gone at the end.
Every check compares all bytes. What Swift does not have (session tokens) is skipped, and says why.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import checks
import swift

from mpreader import AccessDenied, ObjectChanged, ObjectMissing, RangeFetcher, S3ClientConfig
from mpreader.testing.s3_server import aws_environment

KEYS: Final = {
    "spaces": "a key  with spaces ",
    "unicode": "schlüssel/日本/🔑",
    "plus": "a+b+c",
    "percent": "100%/%41%2F%25",
    "double slash": "a//b///c",
    "tilde": "~user/~a",
    "dots": "a/../b/./c",
    "query characters": "a?b=c&d#e;f:g@h",
    "quotes": "'a'\"b\"<c>\\d|e^f`g",
    "very long": "long/" + "x" * 950,
}

Check = Callable[[str], None]


def main() -> int:
    options = _parser().parse_args()
    missing = swift.missing_packages()
    if missing and options.install:
        subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", *missing], check=True)
    elif missing:
        print(f"Debian's packages {' '.join(missing)} are missing; --install installs them", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else the servers would stay
    with swift.Swift() as server:
        print(f"OpenStack Swift {server.version}, {server.url} and {server.tls_url}")
        _point_to(server.url)
        checks.bucket_made("bucket")
        failed = 0
        for name, outcome in checks.run(_chosen(server, options.words), "bucket"):
            print(f"{name}: {outcome}", flush=True)
            failed += outcome.startswith("FAILED")
        if failed:
            print(server.log()[-3000:], file=sys.stderr)
    print(f"{failed} failed" if failed else "all are right")
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/servers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="apt-get install what is missing")
    parser.add_argument("words", nargs="*", help="words of which the name of a check must hold one")
    return parser


def _point_to(url: str, ca_file: Path | None = None) -> None:
    """Set the environment variables of boto3, in place of the user's own."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MPREADER_"))]:
        del os.environ[name]
    os.environ.update(aws_environment(url, ca_file), MPREADER_PROGRESS="0")
    os.environ.update(AWS_ACCESS_KEY_ID=swift.ACCESS_KEY, AWS_SECRET_ACCESS_KEY=swift.SECRET_KEY)
    del os.environ["AWS_SESSION_TOKEN"]
    # Swift does not know the checksums that boto3 appends to uploads since 1.36.
    for kind in ("REQUEST_CHECKSUM_CALCULATION", "RESPONSE_CHECKSUM_VALIDATION"):
        os.environ[f"AWS_{kind}"] = "when_required"


def _chosen(server: swift.Swift, words: list[str]) -> dict[str, Check]:
    every: dict[str, Check] = dict(checks.CHECKS)
    every["parts of an upload"] = check_multipart
    every |= {f"key: {name}": functools.partial(check_key, key=key) for name, key in KEYS.items()}
    every |= {f"signatures in {kind}": functools.partial(check_signing, kind=kind) for kind in ("query", "headers")}
    every |= {
        "wrong secret": check_wrong_secret,
        "no such key": check_missing,
        "overwritten between two reads": check_overwritten,
        "command line": check_command_line,
        "session token": check_session_token,
    }
    every |= {
        f"https: {name}": functools.partial(check_https, check=checks.CHECKS[name], server=server)
        # Not the drop-in: for its own requests s3torchconnector can't be told whom to trust.
        for name in ("save", "load", "fetch", "asyncio", "fsspec")
    }
    at_host_names: dict[str, Check] = {
        **{name: checks.CHECKS[name] for name in ("fetch", "fsspec")},
        # Swift refuses the signature of boto3's own upload of a key with dots there.
        **{f"key: {name}": functools.partial(check_key, key=key) for name, key in KEYS.items() if name != "dots"},
    }
    every |= {
        f"bucket in the host name: {name}": functools.partial(check_virtual_host, check=check, server=server)
        for name, check in at_host_names.items()
    }
    return {name: check for name, check in every.items() if not words or any(word in name for word in words)}


def check_multipart(bucket: str) -> None:
    """Save and load one tensor of 20 MB: Swift has uploads of several parts as an object that names them."""
    import torch
    import torch.distributed.checkpoint as dcp

    from mpreader.dcp import S3StorageReader, S3StorageWriter

    saved, loaded = {"large": torch.arange(5_000_000)}, {"large": torch.zeros(5_000_000, dtype=torch.int64)}
    dcp.save(saved, storage_writer=S3StorageWriter(swift.REGION, f"s3://{bucket}/large"))
    with S3StorageReader(swift.REGION, f"s3://{bucket}/large") as reader:
        dcp.load(loaded, storage_reader=reader)
    assert torch.equal(saved["large"], loaded["large"])


def check_key(bucket: str, *, key: str) -> None:
    checks.put(bucket, key)
    with RangeFetcher() as fetcher:
        checks.fetch_and_compare(fetcher, f"s3://{bucket}/{key}")


def check_signing(bucket: str, *, kind: Any) -> None:
    checks.put(bucket, "signed")
    with RangeFetcher(s3client_config=S3ClientConfig(signing=kind)) as fetcher:
        checks.fetch_and_compare(fetcher, f"s3://{bucket}/signed")


def check_wrong_secret(bucket: str) -> None:
    """Shows that the server checks signatures at all."""
    with _environment(AWS_SECRET_ACCESS_KEY="wrong"), RangeFetcher() as fetcher:
        _must_raise(AccessDenied, fetcher.fetch, f"s3://{bucket}/data.bin", [(0, 10)])


def check_missing(bucket: str) -> None:
    with RangeFetcher() as fetcher:
        _must_raise(ObjectMissing, fetcher.fetch, f"s3://{bucket}/missing", [(0, 10)])
        _must_raise(ObjectMissing, fetcher.fetch, "s3://missing-bucket/missing", [(0, 10)])


def check_overwritten(bucket: str) -> None:
    from mpreader import S3Client, S3ReaderConstructor

    content = checks.CONTENT * 4  # more than the reader takes at one time
    checks.put(bucket, "overwritten", content)
    reader = S3Client().get_object(bucket, "overwritten", reader_constructor=S3ReaderConstructor.range_based())
    assert reader.read(10) == content[:10]
    checks.put(bucket, "overwritten", content[::-1])
    reader.seek(len(content) - 100)
    _must_raise(ObjectChanged, reader.read, 10)


def check_command_line(bucket: str) -> None:
    command = [sys.executable, "-m", "mpreader"]
    done = subprocess.run([*command, "fetch", f"s3://{bucket}/data.bin", "-o", "-"], check=True, stdout=subprocess.PIPE)
    assert done.stdout == checks.CONTENT
    subprocess.run([*command, "doctor", f"s3://{bucket}/data.bin"], check=True, stdout=subprocess.DEVNULL)


def check_session_token(_: str) -> None:
    raise checks.Skipped("Swift hands out no session tokens")


def check_https(bucket: str, *, check: Check, server: swift.Swift) -> None:
    with _environment():
        _point_to(server.tls_url, server.ca_file)
        check(bucket)


def check_virtual_host(bucket: str, *, check: Check, server: swift.Swift) -> None:
    """Make a check at a host name. No resolver knows it, but a proxy need not ask one."""
    with _environment(), _proxy(urlsplit(server.url).netloc) as proxy, tempfile.NamedTemporaryFile("w") as settings:
        settings.write("[default]\ns3 =\n  addressing_style = virtual\n")
        settings.flush()
        _point_to(f"http://{swift.DOMAIN}")
        os.environ.update(AWS_CONFIG_FILE=settings.name)
        os.environ.update(HTTP_PROXY=proxy.url, http_proxy=proxy.url, NO_PROXY="", no_proxy="")
        check(bucket)
    hosts = {host.removesuffix(":80") for host in proxy.hosts}
    assert hosts == {f"{bucket}.{swift.DOMAIN}"}, f"the requests went to {hosts}"


def _must_raise(kind: type[Exception], call: Callable[..., object], *arguments: object) -> None:
    try:
        call(*arguments)
    except kind:
        return
    raise AssertionError(f"no {kind.__name__} was raised")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables within the block; all that is changed there is undone, too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class _Proxy(http.server.ThreadingHTTPServer):
    """An http proxy that sends all requests to one server, whatever host they name."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _ProxiedRequest)
        self.server = server
        self.hosts: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _ProxiedRequest(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def do_GET(self) -> None:
        host, path = urlsplit(self.path).netloc, self.path.split("/", 3)[3]
        self.server.hosts.append(host)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = urllib.request.Request(f"http://{self.server.server}/{path}", body or None, method=self.command)
        for name, value in self.headers.items():
            request.add_header(name, value)
        try:
            answer = _DIRECT.open(request)
        except urllib.error.HTTPError as error:
            answer = error
        content = answer.read()
        self.send_response_only(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in {"connection", "transfer-encoding", "content-length"}:
                self.send_header(name, value)
        of_object = answer.headers["Content-Length"] if self.command == "HEAD" else None
        self.send_header("Content-Length", of_object or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def _proxy(server: str) -> Iterator[_Proxy]:
    with _Proxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
