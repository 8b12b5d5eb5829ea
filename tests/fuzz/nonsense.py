"""Nonsense: wrong answers of an HTTP service, made by chance of the right ones: of every status, header and body."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from typing import Final

from tests.integration.service import Answer, Call

__all__ = ["Nonsense"]

_STATUSES: Final = (
    *(
        200,
        201,
        202,
        203,
        204,
        205,
        206,
        207,
        226,
        300,
        301,
        302,
        303,
        304,
        305,
        307,
        308,
        400,
        401,
        402,
        403,
        404,
        405,
    ),
    *(
        406,
        407,
        408,
        409,
        410,
        411,
        412,
        413,
        414,
        415,
        416,
        417,
        418,
        421,
        425,
        429,
        431,
        451,
        500,
        501,
        502,
        503,
        504,
    ),
    *(505, 507, 511, 599, 600, 999, 99, 0, 1000, -1, 100, 102, 199),
)
_HEADERS: Final = (
    *("Content-Length", "Content-Range", "ETag", "Last-Modified", "Content-Type", "Content-Encoding", "Date"),
    *(
        "Transfer-Encoding",
        "Location",
        "Retry-After",
        "Accept-Ranges",
        "Connection",
        "Server",
        "Expires",
        "Age",
        "Vary",
    ),
    *("Cache-Control", "Content-Disposition", "Content-Language", "Content-MD5", "Trailer", "Upgrade", "Set-Cookie"),
    *(
        "WWW-Authenticate",
        "Proxy-Authenticate",
        "Keep-Alive",
        "Warning",
        "Link",
        "Refresh",
        "X-Odd",
        "x-goog-generation",
    ),
    *(
        "x-amz-bucket-region",
        "x-amz-request-id",
        "x-amz-id-2",
        "x-amz-version-id",
        "x-amz-storage-class",
        "x-amz-restore",
    ),
    *("x-amz-checksum-crc32", "x-amz-checksum-sha256", "x-amz-checksum-type", "x-amz-missing-meta", "x-amz-expiration"),
    *("x-amz-delete-marker", "x-amz-mp-parts-count", "x-amz-tagging-count", "x-amz-object-lock-mode", "x-amz-meta-a"),
    *("x-amz-object-lock-retain-until-date", "x-amz-server-side-encryption", "x-amz-replication-status"),
    *("x-amz-server-side-encryption-bucket-key-enabled", "x-amz-website-redirect-location", "x-amz-request-charged"),
)
_VALUES: Final = (
    *("", " ", "nonsense", "-1", "0", "1", "9", "1.5", "1e3", "0x10", "99999999999999999999999999", "9" * 5000, "1, 2"),
    *("1, 1", "true", "False", "\xff\xfe", "\xb2", "é" * 300, "a" * 20_000, "=?utf-8?q?=00?=", "%00%0d%0a", "{}", "[]"),
    *(
        "bytes",
        "none",
        "bytes 0-0/*",
        "bytes 5-1/9",
        "bytes */*",
        "bytes */9",
        "bytes 0-99999999999999999999/1",
        "0-1/2",
    ),
    *("bytes 0-0/0", "bytes -1-0/9", "bytes 0-4/5", "items 0-1/2", '"', '""', 'W/"a"', "W/", '"a"b"', "*", '"', "'a'"),
    *("Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 99 Foo 99999 99:99:99 XYZ", "0001-01-01T00:00:00Z", "10000-01-01", "now"),
    *("Thu, 01 Jan 0001 00:00:00 +2400", "1e400", "nan", "inf", "chunked", "gzip", "gzip, chunked", "identity", "br"),
    *(
        "http://",
        "https://",
        "//",
        "/",
        "?",
        "http://[::1",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "\\",
        "\t",
        "close",
    ),
    *(
        "keep-alive",
        "eu-west-1",
        "not a region!",
        "..",
        "us-east-1,eu-west-1",
        "application/xml; charset=utf-7",
        "text/html",
    ),
    *('ongoing-request="true', 'expiry-date="', "COMPOSITE", "AAAAAA==", "AAAAAA==-3", "!!!", "GLACIER", "REPLICA"),
)
_DOCUMENTS: Final = (
    *(b"", b" ", b"<", b"</a>", b"<a>", b"<a/>", b"<html><body>log in</body></html>", b"log in", b"{}", b"[]", b"null"),
    *(
        b"\x00" * 100,
        b"\xff\xfe\xfd",
        b"\xef\xbb\xbf<Error/>",
        b"<?xml version='9.9'?><Error/>",
        b"<Error/>",
        b"<Error>",
    ),
    *(b"<Error><Code/><Message/></Error>", b"<Error><Code>NoSuchKey</Code></Error>", b"<Error>text</Error>"),
    *(b"<Error><Code>A</Code><Code>B</Code></Error>", b"<Error><Code><b>c</b></Code></Error>", b"<Error>" * 2000),
    b"<Error><Code>PermanentRedirect</Code><Endpoint>store.example</Endpoint></Error>",
    b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>nowhere!</Region></Error>",
    b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>",
    b"<Error><Code>IllegalLocationConstraintException</Code><Region/></Error>",
    b"<Error><Code>RequestTimeTooSkewed</Code><Message>\x01</Message></Error>",
    b"<Error><Code>ExpiredToken</Code></Error>",
    b"<!DOCTYPE a [<!ENTITY b 'cccccccc'><!ENTITY d '&b;&b;&b;&b;'>]><Error><Code>&d;</Code></Error>",
    b"<ListBucketResult/>",
    b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
    b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>a</NextContinuationToken></ListBucketResult>",
    b"<ListBucketResult><IsTruncated>x</IsTruncated></ListBucketResult>",
    b"<ListBucketResult><Contents/></ListBucketResult>",
    b"<ListBucketResult><KeyCount>many</KeyCount></ListBucketResult>",
    b"<ListBucketResult><Contents><Key>run/a</Key></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Key/><Size>1</Size></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Key>run/a</Key><Size>-1</Size></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Key>run/a</Key><Size>1</Size><ETag/><LastModified/></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Key>run/a</Key><Size>1</Size><LastModified>no</LastModified></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Key>../../a%00</Key><Size>1</Size></Contents></ListBucketResult>",
    b"<ListBucketResult><CommonPrefixes/><IsTruncated>false</IsTruncated></ListBucketResult>",
    b"<ListBucketResult><CommonPrefixes><Prefix/></CommonPrefixes></ListBucketResult>",
    b"<ListBucketResult><EncodingType>url</EncodingType><Contents><Key>%zz</Key></Contents></ListBucketResult>",
    b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>",
    b"<CopyObjectResult><ETag>a</ETag><LastModified>no</LastModified></CopyObjectResult>",
    b"<CompleteMultipartUploadResult/>",
    b"<CreateSessionResult><Credentials/></CreateSessionResult>",
)
_RAW: Final = (
    *(
        b"",
        b"\r\n\r\n",
        b"\n\n",
        b"\0",
        b"HTTP/1.1",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/0.9 200 OK\r\n\r\n",
    ),
    *(
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 OK 200\r\n\r\n",
        b"HTTP/1.1 2 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
    ),
    *(
        b"<html>log in</html>",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"SSH-2.0-x\r\n",
        b"220 ftp\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    ),
    *(
        b"HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: b\r\n\r\n",
    ),
    *(
        b"HTTP/1.1 200 OK\r\nA: \0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 1\n\n1",
        b"HTTP/1.1 200 OK\rContent-Length: 1\r\r1",
    ),
    b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 40,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    b"HTTP/1.1 206 P\r\nTransfer-Encoding: chunked\r\n\r\n2\nab\n0\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n1",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
)
# Which requests get nonsense; the others get the right answer.
_WHICH: Final[tuple[Callable[[Call, int], bool], ...]] = (
    lambda call, number: True,
    lambda call, number: call.method == "HEAD",
    lambda call, number: call.method != "HEAD",
    lambda call, number: call.method in ("GET", "HEAD") and "list-type" not in call.query,
    lambda call, number: "list-type" in call.query or call.method not in ("GET", "HEAD"),
    lambda call, number: call.is_presigned,
    lambda call, number: number > 0,
    lambda call, number: number > 1,
)


class Nonsense:
    """A kind of nonsense that a service answers to some requests; the same one for the same seed.

    Args:
        seed: Decides which.
    """

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self._which = chance.choice(_WHICH)
        self._changes = [self._change(chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        self._raw = chance.choice(_RAW) if chance.random() < 0.15 else None
        self._cut = chance.choice((None, None, None, None, 0, 1, 20, 60))
        self._number = 0

    def answer(self, call: Call, usual: Answer) -> bytes | None:
        """Return the bytes to answer with, after which the connection ends; None: the right answer."""
        number, self._number = self._number, self._number + 1
        if not self._which(call, number):
            return None
        if self._raw is not None:
            return self._raw
        for change in self._changes:
            usual = change(usual)
        lines = [f"HTTP/1.1 {usual.status} Said", *(f"{name}: {value}" for name, value in usual.headers), "", ""]
        body = b"" if call.method == "HEAD" else usual.body
        return "\r\n".join(lines).encode("latin-1") + body[: self._cut]

    @staticmethod
    def _change(chance: random.Random) -> Callable[[Answer], Answer]:
        status, header, value = chance.choice(_STATUSES), chance.choice(_HEADERS), chance.choice(_VALUES)
        document, kind = (
            chance.choice(_DOCUMENTS),
            chance.choice(("status", "set", "set", "set", "add", "drop", "body", "error", "gzip")),
        )

        def change(answer: Answer) -> Answer:
            rest = [pair for pair in answer.headers if pair[0].lower() != header.lower()]
            sized = [pair for pair in answer.headers if pair[0] != "Content-Length"]
            if kind == "status":
                return answer._replace(status=status)
            if kind == "set":
                return answer._replace(headers=[*rest, (header, value)])
            if kind == "add":
                return answer._replace(headers=[*answer.headers, (header, value)])
            if kind == "drop":
                return answer._replace(headers=rest)
            if kind == "gzip":
                body = gzip.compress(answer.body)
                return answer._replace(
                    headers=[*sized, ("Content-Length", str(len(body))), ("Content-Encoding", "gzip")], body=body
                )
            if (kind == "body" or status < 300) and dict(answer.headers).get("Accept-Ranges"):
                # Other bytes with all that belongs to them are no nonsense, but another object.
                return answer._replace(body=answer.body[: len(document)])
            headers = [*sized, ("Content-Length", str(len(document)))]
            return Answer(answer.status if kind == "body" else status, headers, document)

        return change
