"""Checksums of whole objects, as far as S3 has stored them: what a finished download can be compared with."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["StoredChecksums"]

_FIELDS: Final = {
    "ChecksumSHA256": "sha256",
    "ChecksumSHA1": "sha1",
    "ChecksumCRC32": "crc32",
    "ChecksumCRC32C": "crc32c",
    "ChecksumCRC64NVME": "crc64nvme",
}
_MD5_ETAG: Final = re.compile(r'"([0-9a-f]{32})"')
_PLAIN_ENCRYPTION: Final = (None, "AES256")  # with another one the ETag is no MD5
_DIRECTORY_BUCKET: Final = "--x-s3"  # its ETags are random


@dataclass(frozen=True, slots=True)
class StoredChecksums:
    """Checksums that S3 has stored of one version of an object.

    Attributes:
        etag: ETag of that version, as S3 wrote it.
        by_algorithm: Checksums of the whole object in hexadecimal digits, by ``"sha256"``, ``"sha1"``, ``"crc32"``,
            ``"crc32c"``, ``"crc64nvme"`` and ``"md5"`` (where the ETag is one). Checksums of checksums of parts are
            left out.
    """

    etag: str
    by_algorithm: Mapping[str, str]

    @classmethod
    def of_head(cls, bucket: str, response: Mapping[str, Any]) -> StoredChecksums:
        """Read boto3's response to ``head_object`` with ``ChecksumMode="ENABLED"``."""
        found = {}
        if response.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            for field, algorithm in _FIELDS.items():
                digits = _try_hex(response.get(field, ""))
                if digits:
                    found[algorithm] = digits
        etag = response.get("ETag", "")
        md5 = _MD5_ETAG.fullmatch(etag)
        is_encrypted = (
            response.get("ServerSideEncryption") not in _PLAIN_ENCRYPTION or "SSECustomerAlgorithm" in response
        )
        if md5 and not is_encrypted and not bucket.endswith(_DIRECTORY_BUCKET):
            found["md5"] = md5[1]
        return cls(etag, found)


def _try_hex(text: str) -> str | None:
    """Return base64 as hexadecimal digits; None for other text: the checksum of 3 parts' checksums ends in ``-3``."""
    try:
        return base64.b64decode(text, validate=True).hex()
    except binascii.Error:
        return None
