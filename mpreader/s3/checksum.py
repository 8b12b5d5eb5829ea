"""Stored checksums: the checksums of a whole object that S3 has stored, for comparison with a finished download.

Made by :class:`mpreader.s3.client.BaseS3Client` for ``mpreader fetch``. It only reads a response: computing checksums
and comparing them is done by :mod:`mpreader.tools.download`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mpreader.pool.worker.version import Validators, validators_of

__all__ = ["StoredChecksums"]

# Fields of boto3's response, with the names of the algorithms that are used here.
_FIELDS: Final = {
    "ChecksumSHA256": "sha256",
    "ChecksumSHA1": "sha1",
    "ChecksumCRC32": "crc32",
    "ChecksumCRC32C": "crc32c",
    "ChecksumCRC64NVME": "crc64nvme",
}
_MD5_ETAG: Final = re.compile(r'"([0-9a-f]{32})"')
# Values of ServerSideEncryption with which the ETag is the MD5 of the content. With a KMS key it is not.
_PLAIN_ENCRYPTION: Final = (None, "AES256")
_DIRECTORY_BUCKET: Final = "--x-s3"  # end of the names of directory buckets, whose ETags are random


@dataclass(frozen=True, slots=True)
class StoredChecksums:
    """Checksums that S3 has stored of one version of an object.

    Attributes:
        etag: ETag of that version, as S3 wrote it.
        by_algorithm: Checksums of the whole object in hexadecimal digits, by ``"sha256"``, ``"sha1"``, ``"crc32"``,
            ``"crc32c"``, ``"crc64nvme"`` and ``"md5"`` (where the ETag is one). For many objects uploaded in parts S3
            stores only a checksum of the parts' checksums; those are left out.
        validators: All that S3 says of that version, the ETag included.
    """

    etag: str
    by_algorithm: Mapping[str, str]
    validators: Validators = ()

    @classmethod
    def of_head(cls, bucket: str, response: Mapping[str, Any]) -> StoredChecksums:
        """Read boto3's response to ``head_object`` with ``ChecksumMode="ENABLED"``."""
        found = {}
        # Services that know no ChecksumType leave it out. Their checksums of parts' checksums are
        # recognized by the text: see _try_hex.
        if response.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            for field, algorithm in _FIELDS.items():
                digits = _try_hex(response.get(field, ""))
                if digits:
                    found[algorithm] = digits
        etag = response.get("ETag", "")
        md5 = _MD5_ETAG.fullmatch(etag)  # an object uploaded in parts has an ETag that ends in "-" and their number
        is_encrypted = (
            response.get("ServerSideEncryption") not in _PLAIN_ENCRYPTION or "SSECustomerAlgorithm" in response
        )
        if md5 and not is_encrypted and not bucket.endswith(_DIRECTORY_BUCKET):
            found["md5"] = md5[1]
        return cls(etag, found, validators_of(response.get("ResponseMetadata", {}).get("HTTPHeaders", {})))


def _try_hex(text: str) -> str | None:
    """Return base64 text as hexadecimal digits; None for other text.

    A checksum of the checksums of 3 parts ends in ``-3``, which is not base64.
    """
    try:
        return base64.b64decode(text, validate=True).hex()
    except binascii.Error:
        return None
