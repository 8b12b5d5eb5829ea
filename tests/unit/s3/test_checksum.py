"""Checksums that S3 names are taken only where they are of the whole object."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from mpreader.s3.checksum import StoredChecksums

MD5 = "0123456789abcdef0123456789abcdef"


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"ChecksumSHA256": _base64("ab" * 32)}, {"sha256": "ab" * 32}),
        ({"ChecksumCRC32": _base64("0012abcd"), "ChecksumType": "FULL_OBJECT"}, {"crc32": "0012abcd"}),
        (
            {"ChecksumSHA1": _base64("cd" * 20), "ChecksumCRC64NVME": _base64("00" * 8)},
            {"sha1": "cd" * 20, "crc64nvme": "00" * 8},
        ),
        ({"ChecksumCRC32": _base64("0012abcd"), "ChecksumType": "COMPOSITE"}, {}),
        ({"ChecksumSHA256": _base64("ab" * 32) + "-3"}, {}),  # of the checksums of three parts
        ({"ETag": f'"{MD5}"'}, {"md5": MD5}),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "AES256"}, {"md5": MD5}),
        ({"ETag": f'"{MD5}"', "ServerSideEncryption": "aws:kms"}, {}),
        ({"ETag": f'"{MD5}"', "SSECustomerAlgorithm": "AES256"}, {}),
        ({"ETag": f'"{MD5}-3"'}, {}),
        ({"ETag": f'W/"{MD5}"'}, {}),
        ({}, {}),
    ],
)
def test_checksums_are_those_of_the_whole_object(answer: dict[str, Any], expected: dict[str, str]) -> None:
    stored = StoredChecksums.of_head("bucket", answer)
    assert stored == StoredChecksums(answer.get("ETag", ""), expected)


def test_etag_of_a_directory_bucket_is_no_md5() -> None:
    assert StoredChecksums.of_head("bucket--use1-az4--x-s3", {"ETag": f'"{MD5}"'}).by_algorithm == {}
