"""Header signing: signatures of GETs in their headers, as boto3 signs its own requests, for workers to send.

Some services, and some bucket policies, refuse presigned URLs and take signatures in headers only. Host, date and the
hash of the empty body are signed; Range and If-Match are not, so that one signature serves every range of an object. A
service takes it for as long as it takes the date in it, which is 15 minutes for S3.

The hash is that of the empty body, not ``UNSIGNED-PAYLOAD`` as in presigned URLs: policies may refuse the latter.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as BotoClient

__all__ = ["HeaderSigner", "Headers"]

Headers = tuple[tuple[str, str], ...]

_SIGNED: Final = re.compile(r"SignedHeaders=([^,\s]+)")


class _Stopped(Exception):
    """A request was signed, and is not sent."""

    def __init__(self, url: str, headers: Headers) -> None:
        super().__init__()
        self.url = url
        self.headers = headers


class HeaderSigner:
    """Signer of GETs for clients of boto3 that were given to :meth:`watch`. Thread-safe.

    boto3 itself makes and signs the request, and is stopped before it sends it. So endpoint, region, session token,
    the session of a directory bucket and whatever else decides a signature are what they are for any other request.
    """

    def __init__(self) -> None:
        self._thread = threading.local()  # has `is_signing` while its thread is within sign()

    def watch(self, client: BotoClient) -> None:
        """Let this client's requests be stopped by :meth:`sign`; all others go on as usual."""
        client.meta.events.register("before-send.s3.GetObject", self._stop)

    def sign(self, client: BotoClient, **parameters: Any) -> tuple[str, Headers]:
        """Return URL and headers of a GET; makes no request, but may open the session of a directory bucket.

        Args:
            client: A client that was given to :meth:`watch`.
            parameters: Those of ``get_object``. All of them get signed, so there must be no Range among them.

        Raises:
            BotoCoreError: There is nothing to sign with, or a parameter is wrong.
        """
        self._thread.is_signing = True
        try:
            client.get_object(**parameters)
        except _Stopped as stopped:
            return stopped.url, stopped.headers
        finally:
            self._thread.is_signing = False
        raise RuntimeError("boto3 has sent a request that was to be signed only")

    def _stop(self, request: Any, **_: object) -> None:
        if not getattr(self._thread, "is_signing", False):
            return
        headers = {name.lower(): _text(value) for name, value in request.headers.items()}
        signed = _SIGNED.search(headers.get("authorization", ""))
        names = [] if signed is None else signed[1].split(";")
        kept = [(name, headers[name]) for name in names if name != "host" and name in headers]
        raise _Stopped(request.url, (("Authorization", headers.get("authorization", "")), *kept))


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
