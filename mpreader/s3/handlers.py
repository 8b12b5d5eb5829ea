"""Handlers of botocore's events: what boto3's clients do otherwise here than by themselves.

Registered with every client that :mod:`~mpreader.s3.session` makes. Each handler says which failure it avoids.
"""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, Any, Final

from mpreader.s3.failure import Unusable
from mpreader.s3.redaction import redacted

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client as BotoClient

__all__ = ["register_handlers"]

# Requests by which botocore finds out a bucket's region. CreateSession comes before any other request to a directory
# bucket.
_REGION_REQUESTS: Final = ("HeadBucket", "CreateSession")


def register_handlers(client: BotoClient) -> None:
    """Register all handlers with a client."""
    events = client.meta.events
    events.register("before-parameter-build.s3", _presign_for_the_region)
    events.register_first("choose-signer.s3", _presign_with_version_4)
    events.register("before-send.s3", _send_headers_as_text)
    events.register_first("needs-retry.s3", _stop_at_what_is_no_http)
    for operation in _REGION_REQUESTS:
        events.register_first(f"needs-retry.s3.{operation}", _ask_for_the_region_once)


def _presign_for_the_region(context: dict[str, Any], **_: object) -> None:
    """Presign for the region's own endpoint.

    The global endpoint redirects requests for buckets that are new, and a worker can't follow a redirect.
    """
    context.pop("use_global_endpoint", None)


def _presign_with_version_4(signature_version: object, **_: object) -> Any:
    """Presign with SigV4, where boto3's default is SigV2.

    ``Config(signature_version="s3v4")`` can't be used for that: it would also change the signatures for directory
    buckets, which need a session.
    """
    return "s3v4-query" if signature_version == "v4-query" else None


def _ask_for_the_region_once(response: Any, request_dict: dict[str, Any], **_: object) -> None:
    """Make botocore give up on a bucket whose region the service does not name.

    After a redirect that names no region botocore sends a HEAD of the bucket to find the region. If that HEAD is
    redirected in the same way, botocore sends another HEAD for it, and so on to Python's recursion limit. It does not
    do so for a request that is marked as redirected already, so this marks the first HEAD.
    """
    if response is not None and "x-amz-bucket-region" not in response[1]["ResponseMetadata"]["HTTPHeaders"]:
        request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True


def _send_headers_as_text(request: Any, **_: object) -> None:
    """Make all headers of a request text; botocore has bytes in some, over which urllib3 stumbles at a 303."""
    for name, value in list(request.headers.items()):
        if isinstance(value, bytes):
            del request.headers[name]
            request.headers[name] = value.decode("latin-1")


def _stop_at_what_is_no_http(caught_exception: BaseException | None, **_: object) -> None:
    """Make botocore give up on a server that does not speak HTTP, which it takes for a connection that broke.

    Raises:
        Unusable: That is so.
    """
    error = getattr(caught_exception, "kwargs", {}).get("error")
    for reason in getattr(error, "args", ()):
        # These two are connections that broke indeed.
        if isinstance(reason, http.client.HTTPException) and not isinstance(
            reason, (http.client.RemoteDisconnected, http.client.IncompleteRead)
        ):
            raise Unusable(f"the answer is no HTTP ({type(reason).__name__}: {redacted(str(reason))})")
