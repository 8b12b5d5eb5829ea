"""TLS certificate of the test servers: valid for the loopback address only, signed by an authority made for it alone.

The servers of this package, and those of the benchmark, use it. trustme makes the certificates; this module puts them
into files, since boto3, nginx and the embedded S3's own process take paths, not objects.
"""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

__all__ = ["LoopbackCertificate", "server_context"]


class LoopbackCertificate:
    """A certificate for ``localhost`` and ``127.0.0.1``, in PEM files of a temporary folder.

    The files are there until :meth:`close`.

    Attributes:
        ca_file: Certificate of the authority: a client must trust it.
        server_file: Private key and certificate of the server, one behind the other.
    """

    def __init__(self) -> None:
        import trustme  # imported here, since without TLS the fault server needs no further package

        self._folder = tempfile.TemporaryDirectory(prefix="mpreader-tls-")
        self.ca_file = Path(self._folder.name, "ca.pem")
        self.server_file = Path(self._folder.name, "server.pem")
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        server = authority.issue_cert("localhost", "127.0.0.1")
        server.private_key_and_cert_chain_pem.write_to_path(self.server_file)

    def close(self) -> None:
        """Remove the files. Calling it again is harmless."""
        self._folder.cleanup()


def server_context(server_file: str | Path) -> ssl.SSLContext:
    """TLS settings of a server.

    Args:
        server_file: PEM file with the server's private key and its certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server_file)
    return context
