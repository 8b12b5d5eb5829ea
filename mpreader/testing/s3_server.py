"""Embedded S3 server: moto in a process of its own, with ranged GETs fast enough to load checkpoints from.

This module starts and ends that process, which runs :mod:`mpreader.testing.s3_process`. Tests and ``mpreader demo``
hold an :class:`S3Server`; the fault server uses :func:`aws_environment`.
``python -m mpreader.testing.s3_server --port 0`` prints its URL on the first line and ends when its standard
input does, so it never outlives the program that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mpreader.pool.coordinator.interpreter import find_interpreter
from mpreader.testing.certificate import LoopbackCertificate
from mpreader.testing.request_log import LOG_PATH, S3Request

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["REGION", "S3Server", "aws_environment"]

REGION: Final = "us-east-1"


def aws_environment(endpoint_url: str, ca_file: Path | None = None) -> dict[str, str]:
    """The environment variables that point boto3, and all that is built on it, to ``endpoint_url``.

    With them the user's AWS configuration files and proxies are not used. Other ``AWS_*`` variables should be unset.

    Args:
        endpoint_url: URL of a server on the loopback address.
        ca_file: PEM file of the authority that a client must trust; None: the server speaks http.
    """
    # Both spellings of NO_PROXY are set: libraries differ in which one they prefer.
    unproxied = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
    no_proxy = ",".join(filter(None, (unproxied, "127.0.0.1", "localhost")))
    environment = {
        "AWS_ENDPOINT_URL_S3": endpoint_url,
        "AWS_ENDPOINT_URL": endpoint_url,  # the only one that s3torchconnector reads
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_SESSION_TOKEN": "testing",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",  # else boto3 would look for the role of an EC2 instance
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }
    if ca_file is not None:
        environment["AWS_CA_BUNDLE"] = str(ca_file)
    return environment


class S3Server:
    """An S3 for demos and tests on the loopback address, in a process of its own.

    Use it as a context manager. It has S3's behaviour as far as moto has it (multipart uploads, listing,
    conditional requests, error bodies); signatures and expiry times of URLs are not checked. Objects are gone
    when it ends. Needs the packages of ``mpreader[testing]``.

    Args:
        tls: Speak https, with a certificate of its own authority; see :attr:`ca_file`.
    """

    def __init__(self, *, tls: bool = False) -> None:
        self._certificate = LoopbackCertificate() if tls else None
        self._process: subprocess.Popen[str] | None = None
        self._url = ""  # empty while the server is not running

    @property
    def pid(self) -> int:
        """Number of its process.

        Raises:
            RuntimeError: It is not running.
        """
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @property
    def endpoint_url(self) -> str:
        """URL of the server, ``http://127.0.0.1:<port>``.

        Raises:
            RuntimeError: It is not running.
        """
        if not self._url:
            raise RuntimeError("the server is not running; enter its context first")
        return self._url

    @property
    def ca_file(self) -> Path | None:
        """PEM file of the authority that a client must trust; None without TLS. It is there until :meth:`close`."""
        return None if self._certificate is None else self._certificate.ca_file

    @property
    def requests(self) -> list[S3Request]:
        """All requests since the start, in the order in which they were answered."""
        entries = json.loads(self._request("GET", LOG_PATH))  # the requests for the log are in it, too
        return [S3Request(**entry) for entry in entries if entry["path"] != LOG_PATH]

    def environment(self) -> dict[str, str]:
        """The environment variables that point boto3, and all that is built on it, here."""
        return aws_environment(self.endpoint_url, self.ca_file)

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket.

        Raises:
            urllib.error.HTTPError: S3 refuses the name.
        """
        self._request("PUT", f"/{name}")

    def start(self) -> None:
        """Start the process and wait until it listens.

        Raises:
            RuntimeError: It ended instead; its error output says why.
        """
        command = [find_interpreter(), "-m", __name__, "--port", "0"]
        if self._certificate is not None:
            command += ["--certificate", str(self._certificate.server_file)]
        process = subprocess.Popen(  # noqa: S603  # this module, run by this interpreter
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # moto is built on botocore, which a profile of the user's that does not exist would break.
            env={name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MOTO_"))},
            # Ctrl-C in the terminal is for the program under test; this server ends with its standard input.
            start_new_session=True,
        )
        self._process = process
        assert process.stdout is not None
        # The URL is the only line; then the pipe is closed, so that the process can't block on a full one.
        with process.stdout as first_line:
            self._url = first_line.readline().strip()  # empty if the process ended before it listened
        if not self._url:
            self.close()
            raise RuntimeError("the embedded S3 server did not start; is mpreader[testing] installed?")

    def close(self) -> None:
        """End the process and wait for it. Idempotent."""
        process, self._process, self._url = self._process, None, ""
        if process is not None:
            process.communicate()  # closes its standard input, at whose end the process ends, and waits for it
        if self._certificate is not None:
            self._certificate.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<S3Server {self._url or 'not running'}>"

    def _request(self, method: str, path: str) -> bytes:
        # moto refuses to make a bucket without a signature, but does not check it.
        headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential=testing/20200101/{REGION}/s3/aws4_request, -"}
        content = b"" if method == "PUT" else None
        request = urllib.request.Request(self.endpoint_url + path, content, headers, method=method)  # noqa: S310
        context = None if self.ca_file is None else ssl.create_default_context(cafile=str(self.ca_file))
        # Without proxies: those of the user's environment would not reach the loopback address.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(request, timeout=60) as response:
            body: bytes = response.read()
        return body


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="TCP port on 127.0.0.1; 0 (default): any free one")
    parser.add_argument("--certificate", help="PEM file of a certificate and its private key, to speak https")
    options = parser.parse_args(arguments)
    from mpreader.testing.s3_process import serve  # imports moto, which the importers of this module may lack

    serve(options.port, options.certificate)


if __name__ == "__main__":
    _main(sys.argv[1:])
