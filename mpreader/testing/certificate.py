"""Throw-away certificates, so that the test servers can speak TLS on the loopback address."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__all__ = ["LoopbackCertificate"]


class LoopbackCertificate:
    """A certificate for ``localhost`` and ``127.0.0.1``, signed by an authority of its own, in PEM files.

    The files live in a temporary folder until :meth:`close`. Needs the ``cryptography`` package.

    Attributes:
        ca_file: The authority's certificate: what a client must trust.
        chain_file: The server's certificate.
        key_file: The server's private key.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mpreader-tls-")
        folder = Path(self._folder.name)
        self.ca_file = folder / "ca.pem"
        self.chain_file = folder / "server.pem"
        self.key_file = folder / "server.key"
        _write_certificates(self.ca_file, self.chain_file, self.key_file)

    def server_context(self) -> ssl.SSLContext:
        """The TLS settings of a server that shows this certificate."""
        return server_context(self.chain_file, self.key_file)

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def server_context(chain_file: str | Path, key_file: str | Path) -> ssl.SSLContext:
    """The TLS settings of a server that shows the certificate in ``chain_file``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain_file, key_file)
    return context


def _write_certificates(ca_file: Path, chain_file: Path, key_file: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = _authority(ca_key.public_key())
    server = _builder("localhost", server_key.public_key(), ca_key.public_key()).add_extension(
        x509.SubjectAlternativeName(addresses), critical=False
    )
    for file, builder in ((ca_file, ca), (chain_file, server)):
        file.write_bytes(builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key_file.write_bytes(server_key.private_bytes(pem, pkcs8, serialization.NoEncryption()))


_AUTHORITY = "mpreader test authority"


def _authority(key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    from cryptography import x509

    unused = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False,
    )  # fmt: skip
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **unused)
    return (
        _builder(_AUTHORITY, key, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )


def _builder(
    name: str, key: ec.EllipticCurvePublicKey, issuer_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, _AUTHORITY))
    # The key identifiers are not for decoration: Python 3.13 refuses certificates without them.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
